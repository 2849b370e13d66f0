import contextlib
import time
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth import credentials
from server.auth.credentials import (
    MAX_QUERY_BYTES,
    MAX_SESSION_COOKIES,
    TOKEN_PARAMETERS,
    BadCredential,
    Credential,
    TokenInUrl,
    cookie_suffix,
    find_credentials,
    is_foreign_page,
    origin_matches,
    parse_cookies,
)
from tests.support.tokens import Signer

PUBLISHABLE_KEY = "pk_test_Y2xlcmsuZXhhbXBsZS5jb20k"
SUFFIXED = f"__session_{cookie_suffix(PUBLISHABLE_KEY)}"
TOKEN = Signer().mint()


def find_all(
    *headers: tuple[str, str], query: bytes | str = b"", allow_ticket: bool = False
) -> list[Credential]:
    return find_credentials(
        [(name.encode(), value.encode("latin-1")) for name, value in headers],
        query.encode() if isinstance(query, str) else query,
        publishable_key=PUBLISHABLE_KEY,
        allow_ticket=allow_ticket,
    )


def find(*headers: tuple[str, str], **how: Any) -> Credential | None:
    """The one that is tried first."""
    return next(iter(find_all(*headers, **how)), None)


# The Authorization header


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer ", " Bearer"])
def test_a_bearer_token_is_found(scheme: str):
    assert find(("authorization", f"{scheme} {TOKEN}")) == Credential("bearer", TOKEN)


@pytest.mark.parametrize(
    "value",
    ["", " ", "Bearer", "Bearer ", TOKEN, "Bearer a b", "Bearer a,b", "Bearer \xe9", "Bearer a\tb"],
)
def test_a_malformed_authorization_is_bad_even_beside_a_good_cookie(value: str):
    with pytest.raises(BadCredential):
        find(("authorization", value), ("cookie", "__session=good"))


@pytest.mark.parametrize("second", ["Bearer a", "Bearer b", "Basic dTpw", ""])
def test_two_authorizations_are_bad(second: str):
    with pytest.raises(BadCredential):
        find(("authorization", "Bearer a"), ("authorization", second))


def test_another_scheme_is_passed_over():
    assert find(("authorization", "Basic dTpw")) is None
    assert find(("authorization", "Basic dTpw"), ("cookie", "__session=a")) == Credential(
        "cookie", "a"
    )


# Cookies


def test_the_suffix_is_in_the_alphabet_of_urls():
    assert cookie_suffix("pk_test_5") == "Rt0o-K_Q"  # `Rt0o+K/Q` in plain base64


def test_the_suffixed_cookie_comes_before_the_plain_one():
    assert find(("cookie", f"__session=plain; {SUFFIXED}=own")) == Credential("cookie", "own")
    assert find(("cookie", "__session=plain")) == Credential("cookie", "plain")
    assert find(("cookie", f"{SUFFIXED}=own")) == Credential("cookie", "own")


def test_session_cookies_are_tried_in_their_order_each_once():
    cookie = f"__session=a; {SUFFIXED}=; __session=b; {SUFFIXED}=own; __session=a"
    values = [credential.value for credential in find_all(("cookie", cookie))]
    assert values == ["own", "a", "b"]
    assert {credential.kind for credential in find_all(("cookie", cookie))} == {"cookie"}


def test_no_more_session_cookies_are_tried_than_a_browser_may_have():
    cookie = "; ".join(f"__session={number}" for number in range(100))
    values = [credential.value for credential in find_all(("cookie", cookie))]
    assert values == [str(number) for number in range(MAX_SESSION_COOKIES)]


def test_a_header_is_tried_alone():
    both = ("authorization", "Bearer a"), ("cookie", "__session=b")
    assert find_all(*both, query="ticket=c", allow_ticket=True) == [Credential("bearer", "a")]


def test_an_empty_cookie_is_none():
    assert find(("cookie", f"{SUFFIXED}=; __session=plain")) == Credential("cookie", "plain")
    assert find(("cookie", "__session=")) is None
    assert find(("cookie", "__session")) is None


@pytest.mark.parametrize(
    "name", ["__session_AAAAAAAA", "__Session", "x__session", "__sessions", "__session_"]
)
def test_a_cookie_of_another_name_is_not_ours(name: str):
    assert find(("cookie", f"{name}=a")) is None


def test_cookies_split_over_headers_are_one_list():
    headers = [("cookie", "a=1"), ("host", "h"), ("cookie", "__session=x"), ("cookie", "b=2")]
    assert find(*headers) == Credential("cookie", "x")


def test_a_cookie_ends_at_its_semicolon_and_begins_after_its_first_equals_sign():
    raw = [b" a = 1 ;b=2=3;; c;=d; \te=\t5;a=second", b'f="6"']
    assert parse_cookies(raw) == {
        "a": ["1", "second"],
        "b": ["2=3"],
        "": ["d"],
        "e": ["5"],
        "f": ['"6"'],
    }


def test_a_cookie_that_only_holds_ours_in_its_value_is_not_ours():
    assert find(("cookie", "a=__session=x")) is None
    assert find(("cookie", 'a="; __session=x')) == Credential("cookie", "x")


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_cookies_or_none(values: list[bytes]):
    for name, found in parse_cookies(values).items():
        assert ";" not in name + "".join(found)
        assert "=" not in name


def test_the_header_comes_before_the_cookie_and_the_cookie_before_the_ticket():
    header, cookie = ("authorization", "Bearer a"), ("cookie", "__session=b")
    query = "ticket=c"
    assert find(header, cookie, query=query, allow_ticket=True) == Credential("bearer", "a")
    assert find(cookie, query=query, allow_ticket=True) == Credential("cookie", "b")
    assert find(query=query, allow_ticket=True) == Credential("ticket", "c")


# The query string


def test_a_ticket_counts_only_where_it_is_allowed():
    assert find(query="ticket=abc") is None
    assert find(query="lastEventId=7&ticket=a%2Bb", allow_ticket=True) == Credential(
        "ticket", "a+b"
    )
    assert find(query="ticket=", allow_ticket=True) is None
    assert find(query="Ticket=abc", allow_ticket=True) is None


def test_two_tickets_are_bad():
    with pytest.raises(BadCredential):
        find(query="ticket=a&ticket=b", allow_ticket=True)


@pytest.mark.parametrize("name", sorted(TOKEN_PARAMETERS))
@pytest.mark.parametrize("value", ["", "=", "=anything"])
def test_a_parameter_that_is_named_as_a_token_is_refused(name: str, value: str):
    for spelling in (name, name.upper(), f"%{ord(name[0]):02x}{name[1:]}", f"+{name}"):
        with pytest.raises(TokenInUrl):
            find(("authorization", "Bearer good"), query=f"lastEventId=7&{spelling}{value}")


@pytest.mark.parametrize(
    "query",
    [
        f"x={TOKEN}",
        f"ticket={TOKEN}",
        f"lastEventId=7&x={TOKEN}&y=1",
        TOKEN,
        f"{TOKEN}=1",
        f"a;x={TOKEN}",
        f"x=Bearer+{TOKEN}",
        f"x=Bearer%20{TOKEN}",
        f"x={quote(TOKEN).replace('.', '%2E')}",
        "x=" + "".join(f"%{ord(character):02x}" for character in TOKEN),
        "x=" + TOKEN.replace("e", "%65", 1),
        "x=" + TOKEN.rpartition(".")[0] + ".",
    ],
)
def test_what_looks_like_a_token_is_refused_wherever_it_stands(query: str):
    for headers in ((), (("authorization", f"Bearer {TOKEN}"),), (("cookie", "__session=a"),)):
        with pytest.raises(TokenInUrl) as refused:
            find(*headers, query=query, allow_ticket=True)
        assert refused.value.args == ()


@pytest.mark.parametrize(
    "query", ["channelId=42", "lastEventId=2.17", "x=1.2.3", "x=heyJ.a.b", "x=eyJ.a", "tokens=1"]
)
def test_what_is_no_token_passes(query: str):
    assert find(query=query) is None


def test_a_query_string_too_long_to_look_through_is_bad():
    assert find(query=b"a" * MAX_QUERY_BYTES) is None
    with pytest.raises(BadCredential):
        find(query=b"a" * (MAX_QUERY_BYTES + 1))
    with pytest.raises(BadCredential):
        find(query=b"&" * MAX_QUERY_BYTES + TOKEN.encode())


@pytest.mark.parametrize("unit", ["eyJ", "eyJ.", "eyJa.", "eyJa.a!", "&eyJ", "%", "&", "ey", "=&"])
def test_the_search_for_a_token_is_linear(unit: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(credentials, "MAX_QUERY_BYTES", 100_000)
    started = time.process_time()
    with contextlib.suppress(TokenInUrl):
        find(query=(unit * 100_000)[:100_000])
    assert time.process_time() - started < 1  # some seconds if it were quadratic


@given(st.binary(max_size=200))
def test_any_query_string_is_answered(query: bytes):
    try:
        found = find(query=query, allow_ticket=True)
    except (BadCredential, TokenInUrl):
        return
    assert found is None or found.kind == "ticket"


def test_nothing_of_a_credential_is_in_its_repr():
    assert "canary" not in f"{Credential('bearer', 'canary')!r}"


# The origin


def encoded(*headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers]


def matches(*headers: tuple[str, str], allowed: tuple[str, ...] = ()) -> bool:
    return origin_matches(encoded(*headers), allowed_origins=allowed)


REWRITTEN = ("host", "127.0.0.1:8000")
"""What Next.js and Vite make of the page's own host."""


@pytest.mark.parametrize("origin", ["https://app.example.com", "null", "https://evil.example"])
def test_a_browsers_word_that_the_page_is_ours_is_enough(origin: str):
    """No page can set the header; a client that is no browser has no cookie of somebody else."""
    assert matches(("sec-fetch-site", "same-origin"), ("origin", origin), REWRITTEN)
    assert matches(("sec-fetch-site", "same-origin"), REWRITTEN)


@pytest.mark.parametrize(
    "sites",
    [
        (),
        ("",),
        ("same-site",),
        ("cross-site",),
        ("none",),
        ("Same-Origin",),
        ("same-origin ",),
        ("same-origin, cross-site",),
        ("same-origin, same-origin",),
        ("same-origin", "same-origin"),
        ("same-origin", "cross-site"),
        ("cross-site", "same-origin"),
    ],
)
def test_any_other_word_of_a_browser_leaves_it_to_the_origin(sites: tuple[str, ...]):
    said = [("sec-fetch-site", site) for site in sites]
    page = ("origin", "https://app.example.com")
    assert not matches(*said, page, REWRITTEN)
    assert not matches(*said, REWRITTEN)
    assert matches(*said, page, ("host", "app.example.com"))
    assert matches(*said, page, REWRITTEN, allowed=("https://app.example.com",))


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ([], False),
        ([("sec-fetch-site", "same-origin")], False),
        ([("sec-fetch-site", "none")], False),
        ([("sec-fetch-site", "cross-site")], True),
        ([("sec-fetch-site", "same-site")], True),
        ([("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")], True),
        ([("sec-fetch-site", "anything")], True),
        ([("origin", "https://evil.example")], True),
        ([("origin", "https://evil.example"), ("sec-fetch-site", "none")], True),
        ([("origin", "null"), ("sec-fetch-site", "cross-site")], True),
        ([("origin", "https://evil.example"), ("origin", "https://friend.example")], True),
        ([("origin", "https://friend.example"), ("sec-fetch-site", "cross-site")], False),
        ([("origin", "http://127.0.0.1:8000")], False),
        ([("origin", "https://app.example.com"), ("sec-fetch-site", "same-origin")], False),
    ],
)
def test_a_stream_with_a_cookie_is_opened_by_pages_of_ours_only(
    headers: list[tuple[str, str]], foreign: bool
):
    allowed = ("https://friend.example",)
    assert is_foreign_page(encoded(*headers, REWRITTEN), allowed_origins=allowed) is foreign


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://app.example.com", "app.example.com"),
        ("https://App.Example.com", "app.EXAMPLE.com"),
        ("https://app.example.com", "app.example.com:443"),
        ("https://app.example.com:443", "app.example.com"),
        ("http://app.example.com", "app.example.com:80"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
@pytest.mark.parametrize("name", ["host", ":authority"])
def test_the_own_origin_matches(origin: str, host: str, name: str):
    assert matches(("origin", origin), (name, host))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "app.example.com"),
        ("https://app.example.com.evil.example", "app.example.com"),
        ("https://evil-app.example.com", "app.example.com"),
        ("https://app.example.com:8443", "app.example.com"),
        ("https://app.example.com", "app.example.com:80"),
        ("http://app.example.com:443", "app.example.com"),
        ("https://app.example.com/", "app.example.com"),
        ("https://evil.example/app.example.com", "app.example.com"),
        ("https://app.example.com@evil.example", "app.example.com"),
        ("app.example.com", "app.example.com"),
        ("//app.example.com", "app.example.com"),
        ("ftp://app.example.com", "app.example.com"),
        ("chrome-extension://app.example.com", "app.example.com"),
        ("https://", ""),
        ("https://app.example.com https://app.example.com", "app.example.com"),
        ("https://app.example.com\n", "app.example.com"),
        ("https://app.example.com/x", "app.example.com/x"),
        ("null", "null"),
        ("", ""),
        ("https://\xe9.example", "\xe9.example"),
    ],
)
def test_another_origin_does_not_match(origin: str, host: str):
    assert not matches(("origin", origin), ("host", host))


def test_no_origin_does_not_match():
    assert not matches(("host", "app.example.com"), allowed=("https://app.example.com",))


def test_two_origins_do_not_match_even_if_both_would():
    origin = ("origin", "https://app.example.com")
    assert not matches(origin, origin, ("host", "app.example.com"))


def test_without_one_clear_host_only_the_allowed_origins_match():
    origin = ("origin", "https://a.example")
    assert not matches(origin)
    assert not matches(origin, ("host", "a.example"), ("host", "b.example"))
    assert not matches(origin, ("host", "a.example"), (":authority", "b.example"))
    assert matches(origin, ("host", "a.example"), (":authority", "a.example"))
    assert matches(origin, allowed=("https://a.example",))


def test_an_allowed_origin_is_compared_with_its_scheme():
    host = ("host", "api.example.com")
    allowed = ("https://app.example.com", "http://localhost:3000")
    assert matches(("origin", "https://app.example.com:443"), host, allowed=allowed)
    assert matches(("origin", "http://LOCALHOST:3000"), host, allowed=allowed)
    assert not matches(("origin", "http://app.example.com"), host, allowed=allowed)
    assert not matches(("origin", "http://localhost"), host, allowed=allowed)


@pytest.mark.parametrize("allowed", ["null", "*", "", "https://*.example.com"])
def test_null_and_patterns_allow_nobody(allowed: str):
    for origin in ("null", "https://evil.example", "https://a.example.com", "*", ""):
        assert not matches(("origin", origin), ("host", "h"), allowed=(allowed,))
