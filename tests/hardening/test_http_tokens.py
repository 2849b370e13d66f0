"""Credentials over real HTTP: what must not open the door, and by which door one must come."""

import json
import time
from collections.abc import Callable

import httpx
import pytest

from server.auth.credentials import cookie_suffix
from tests.support.chat import APP_ORIGIN, PUBLISHABLE_KEY, Chat, Pair
from tests.support.tokens import Signer, b64, hmac_token, raw_token
from tests.support.wire import WIRE

ATTACKER = Signer("attacker")
SUFFIXED = f"__session_{cookie_suffix(PUBLISHABLE_KEY)}"


@pytest.fixture(scope="module")
def pair(chat: Chat) -> Pair:
    return chat.pair()


def assert_401(response: httpx.Response, code: str = "UNAUTHENTICATED") -> None:
    assert (response.status_code, response.json()["code"]) == (401, code)
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"


def claims(chat: Chat, pair: Pair, **more: object) -> dict[str, object]:
    now = time.time()
    return {**chat.signer.claims(now=now, sub=pair.prospect.clerk_id), **more}


BadToken = Callable[[Chat, Pair], str]


def mint(**overrides: object) -> BadToken:
    return lambda chat, pair: chat.signer.mint(sub=pair.prospect.clerk_id, **overrides)  # type: ignore[arg-type]


def mint_at(seconds: float, **overrides: object) -> BadToken:
    """A token of another time, in seconds from now."""
    return lambda chat, pair: chat.signer.mint(
        now=time.time() + seconds,
        sub=pair.prospect.clerk_id,
        **overrides,  # type: ignore[arg-type]
    )


def forged(headers: dict[str, object]) -> BadToken:
    return lambda _, pair: ATTACKER.mint(sub=pair.prospect.clerk_id, headers=headers)


BAD_TOKENS: dict[str, BadToken] = {
    "jku": forged({"kid": "key-1", "jku": "https://attacker.example/jwks.json"}),
    "jwk": forged({"kid": "attacker", "jwk": ATTACKER.jwk()}),
    "x5u": forged({"kid": "key-1", "x5u": "https://attacker.example/cert.pem"}),
    "a good token with a jku": mint(headers={"jku": "https://attacker.example/jwks.json"}),
    "alg none": lambda chat, pair: raw_token(
        {"alg": "none", "typ": "JWT"}, claims(chat, pair), b""
    ),
    "alg none with a signature": lambda chat, pair: raw_token(
        {"alg": "none", "typ": "JWT"}, claims(chat, pair)
    ),
    "HS256 with the public key": lambda chat, pair: hmac_token(
        {"alg": "HS256", "typ": "JWT", "kid": "key-1"}, claims(chat, pair), chat.signer.pem.encode()
    ),
    "wrong key": forged({"kid": "key-1"}),
    "RS512": mint(algorithm="RS512"),
    "expired": mint_at(-3600),
    "expired beyond the leeway": mint(exp=int(time.time()) - 6),
    "future": mint_at(3600),
    "not valid yet": mint(nbf=int(time.time()) + 3600),
    "other issuer": mint(iss="https://clerk.attacker.example"),
    "no issuer": mint(iss=...),
    "pending": mint(sts="pending"),
    "no subject": lambda chat, _: chat.signer.mint(sub=...),
    "two dots missing": lambda chat, pair: chat.token(pair.prospect).replace(".", ""),
    "one dot missing": lambda chat, pair: chat.token(pair.prospect).replace(".", "", 1),
    "a changed payload": lambda chat, pair: _changed(chat.token(pair.prospect), chat, pair),
    "40 kB long": lambda chat, pair: chat.token(pair.prospect) + "A" * 40_000,
    "40 kB of claims": mint(padding="x" * 30_000),
    "a ticket": lambda chat, pair: chat.post("/api/chat/ticket", pair.prospect).json()["ticket"],
    "no token": lambda chat, pair: "x",
}


def _changed(token: str, chat: Chat, pair: Pair) -> str:
    header, _, signature = token.split(".")
    payload = b64(json.dumps(claims(chat, pair, sub=pair.therapist.clerk_id)).encode())
    return f"{header}.{payload}.{signature}"


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_a_bad_token_is_401_in_the_header_and_in_the_cookie(chat: Chat, pair: Pair, kind: str):
    token = BAD_TOKENS[kind](chat, pair)
    before = chat.stored(pair.channel_id)
    body = {"channelId": pair.channel_id, "content": "no"}
    for headers in (
        {"authorization": f"Bearer {token}"},
        {"cookie": f"__session={token}", "origin": APP_ORIGIN},
        {"cookie": f"{SUFFIXED}={token}", "origin": APP_ORIGIN},
    ):
        answers = [
            chat.client.get(f"/api/chat/{pair.channel_id}", headers=headers),
            chat.client.post("/api/chat/send", headers=headers, json=body),
        ]
        for answer in answers:
            # Its bearer knows of a genuine one that it expired; nothing else is told apart.
            assert_401(answer, "TOKEN_EXPIRED" if "expired" in kind else "UNAUTHENTICATED")
            assert token not in answer.text
    assert chat.stored(pair.channel_id) == before


def test_the_untouched_token_opens_every_door(chat: Chat, pair: Pair):
    """Otherwise everything above would be refused for some other reason."""
    token = chat.token(pair.prospect)
    for headers in (
        {"authorization": f"Bearer {token}"},
        {"authorization": f"bearer  {token}"},
        {"cookie": f"__session={token}"},
        {"cookie": f"theme=dark; {SUFFIXED}={token}; x=y"},
    ):
        with chat.stream(pair.channel_id, None, headers) as events:
            events.connected()


@pytest.mark.parametrize(
    "authorization", ["Bearer", "Bearer a b", "Bearer é", "Bearer x,y", "Bearer\tx"]
)
def test_a_malformed_authorization_is_401(chat: Chat, pair: Pair, authorization: str):
    """Also beside a good cookie: a bad credential is not made good by the next."""
    cookie = f"__session={chat.token(pair.prospect)}"
    headers = [(b"authorization", authorization.encode()), (b"cookie", cookie.encode())]
    assert_401(chat.client.get("/api/chat/availability", headers=headers))


# In the URL

IN_URL = [
    "token={}",
    "access_token={}",
    "jwt={}",
    "session={}",
    "__session={}",
    "Authorization=Bearer%20{}",
    "anything={}",
    "ticket={}",
    "lastEventId={}",
    "{}",
    "{}=1",
    "a=1;b={}",
    "a=1&b=Bearer+{}",
]


@pytest.mark.parametrize("form", IN_URL)
def test_a_token_in_the_url_is_refused_whatever_it_is_called(chat: Chat, pair: Pair, form: str):
    """Also beside a good header: the client must not get used to it."""
    token = chat.token(pair.prospect)
    target = f"{pair.channel_id}?{form.format(token)}"
    for headers in ({}, {"authorization": f"Bearer {token}"}):
        with chat.stream(target, None, headers) as events:
            assert events.status == 401
            assert events.problem()["code"] == "TOKEN_IN_URL"
            assert token.encode() not in events.body()


@pytest.mark.parametrize("name", ["token", "access_token", "jwt", "session", "__session"])
def test_what_is_called_a_token_in_the_url_is_refused_whatever_it_is(
    chat: Chat, pair: Pair, name: str
):
    answer = chat.get(f"/api/chat/availability?{name}=x", pair.prospect)
    assert_401(answer, "TOKEN_IN_URL")


def test_a_percent_encoded_token_in_the_url_is_refused(chat: Chat, pair: Pair):
    token = "".join(f"%{ord(char):02x}" for char in chat.token(pair.prospect))
    answer = chat.get(f"/api/chat/availability?x={token}", pair.prospect)
    assert answer.status_code == 401


def test_a_token_in_the_path_is_no_path(chat: Chat, pair: Pair):
    token = chat.token(pair.prospect)
    answer = chat.client.get(f"/api/chat/{token}")
    assert answer.status_code == 404
    assert token not in answer.text


# Cookies

POSTS = {
    "/api/chat/send": {"content": "by cookie"},
    "/api/chat/messaging": {"action": "mark_read"},
    "/api/chat/ticket": {},
}


def post_with_cookie(
    chat: Chat, pair: Pair, path: str, origin: str | None, *more: tuple[str, str]
) -> httpx.Response:
    body = {**POSTS[path], "channelId": pair.channel_id}
    headers = [("cookie", f"__session={chat.token(pair.prospect)}"), *more]
    if origin is not None:
        headers.append(("origin", origin))
    return chat.client.post(path, headers=headers, json=body)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "",
        "https://evil.example",
        APP_ORIGIN + ".evil.example",
        "http://app.example.com",
    ],
)
def test_a_post_with_a_cookie_and_no_origin_of_ours_is_refused(
    chat: Chat, pair: Pair, path: str, origin: str | None
):
    before = chat.stored(pair.channel_id)
    answer = post_with_cookie(chat, pair, path, origin)
    assert (answer.status_code, answer.json()["code"]) == (403, "ORIGIN_REFUSED")
    assert chat.stored(pair.channel_id) == before
    row = chat.audit(answer.headers["x-request-id"])
    assert (row["outcome"], row["detail"]) == ("refused", "ORIGIN_REFUSED")
    assert row["actor"] == pair.prospect.clerk_id


@pytest.mark.parametrize("path", POSTS)
def test_two_origins_are_none(chat: Chat, pair: Pair, path: str):
    more = ("origin", "https://evil.example")
    answer = post_with_cookie(chat, pair, path, APP_ORIGIN, more)
    assert answer.json()["code"] == "ORIGIN_REFUSED"


@pytest.mark.parametrize("path", POSTS)
def test_a_post_with_a_cookie_through_a_proxy_that_rewrites_host_is_taken(
    chat: Chat, pair: Pair, path: str
):
    """As Next.js and Vite do, which pass on what the browser says of the page."""
    page = "https://chat.example.com"
    for said in ((), (("sec-fetch-site", "same-site"),), (("sec-fetch-site", "same-origin"),) * 2):
        refused = post_with_cookie(chat, pair, path, page, *said)
        assert (refused.status_code, refused.json()["code"]) == (403, "ORIGIN_REFUSED")
        assert "SOTTOVOCE_ALLOWED_ORIGINS" in refused.json()["detail"], "the remedy has its name"
    answer = post_with_cookie(chat, pair, path, page, ("sec-fetch-site", "same-origin"))
    assert answer.status_code == 200


def test_a_page_of_another_site_opens_no_stream_with_a_cookie(chat: Chat, pair: Pair):
    """It would end the person's oldest one; it could read nothing of it anyway."""
    cookie = {"cookie": f"__session={chat.token(pair.prospect)}"}
    for said in (
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
    ):
        with chat.stream(pair.channel_id, None, {**cookie, **said}) as events:
            assert (events.status, events.problem()["code"]) == (403, "ORIGIN_REFUSED")
    for said in (
        {},
        {"sec-fetch-site": "same-origin"},
        {"origin": APP_ORIGIN, "sec-fetch-site": "cross-site"},
    ):
        with chat.stream(pair.channel_id, None, {**cookie, **said}) as events:
            events.connected()


def test_a_cookie_that_merely_expired_does_not_hide_the_next(chat: Chat, pair: Pair):
    """Browsers keep an old one beside the new one, of another path or a parent domain."""
    good = chat.token(pair.prospect)
    old = chat.token(pair.prospect, exp=int(time.time()) - 3600)
    older = chat.token(pair.prospect, exp=int(time.time()) - 7 * 86_400)
    for cookie in (
        f"__session={old}; __session={good}",
        f"{SUFFIXED}={old}; __session={good}",
        f"{SUFFIXED}={older}; __session={old}; __session={good}",
    ):
        answer = chat.client.get("/api/chat/availability", headers={"cookie": cookie})
        assert answer.status_code == 200
    cookie = f"__session={older}; __session={old}"
    answer = chat.client.get("/api/chat/availability", headers={"cookie": cookie})
    assert_401(answer, "TOKEN_EXPIRED")


def test_a_forged_cookie_is_refused_whatever_follows_it(chat: Chat, pair: Pair):
    good = chat.token(pair.prospect)
    old = chat.token(pair.prospect, exp=int(time.time()) - 3600)
    for bad in (
        good[:-8] + "AAAAAAAA",
        old[:-8] + "AAAAAAAA",
        "x",
        chat.token(pair.prospect, iss="https://clerk.evil.example", exp=int(time.time()) - 60),
    ):
        for cookie in (f"__session={bad}; __session={good}", f"{SUFFIXED}={bad}; __session={good}"):
            answer = chat.client.get("/api/chat/availability", headers={"cookie": cookie})
            assert_401(answer)


@pytest.mark.parametrize("path", POSTS)
def test_a_post_with_a_cookie_from_our_origin_is_taken(chat: Chat, pair: Pair, path: str):
    for origin in (APP_ORIGIN, chat.base):
        assert post_with_cookie(chat, pair, path, origin).status_code == 200


def test_a_post_with_a_bearer_needs_no_origin(chat: Chat, pair: Pair):
    body = {"channelId": pair.channel_id, "content": "x"}
    origin = {"origin": "https://evil.example"}
    assert chat.post("/api/chat/send", pair.prospect, body, origin).status_code == 200


def test_a_stream_with_a_cookie_needs_no_origin(chat: Chat, pair: Pair):
    """EventSource sends none to its own origin."""
    with chat.stream(
        pair.channel_id, None, {"cookie": f"__session={chat.token(pair.prospect)}"}
    ) as events:
        events.connected()


def test_the_bearer_beats_the_cookie(chat: Chat, pair: Pair):
    other = chat.person()
    headers = {"cookie": f"__session={chat.token(pair.prospect)}"}
    with chat.stream(pair.channel_id, other, headers) as events:
        assert events.problem()["code"] == "NOT_YOUR_CHANNEL"
    headers = {"cookie": f"__session={chat.token(other)}"}
    with chat.stream(pair.channel_id, pair.prospect, headers) as events:
        events.connected()


def test_the_suffixed_cookie_beats_the_plain_one(chat: Chat, pair: Pair):
    mine, others = chat.token(pair.prospect), chat.token(chat.person())
    with chat.stream(
        pair.channel_id, None, {"cookie": f"__session={others}; {SUFFIXED}={mine}"}
    ) as events:
        events.connected()


def test_the_cookie_of_another_application_is_not_ours(chat: Chat, pair: Pair):
    token = chat.token(pair.prospect)
    for name in ("__session_AbCdEfGh", "__SESSION", "session", "__session_"):
        answer = chat.client.get("/api/chat/availability", headers={"cookie": f"{name}={token}"})
        assert_401(answer)


def test_the_cookie_beats_the_ticket_and_does_not_use_it_up(chat: Chat, pair: Pair):
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    target = f"{pair.channel_id}?ticket={ticket}"
    cookie = {"cookie": f"__session={chat.token(chat.person())}"}
    with chat.stream(target, None, cookie) as events:
        assert events.problem()["code"] == "NOT_YOUR_CHANNEL"
    with chat.stream(target, None) as events:
        events.connected()


def test_a_ticket_that_nobody_issued_is_401(chat: Chat, pair: Pair):
    for ticket in ("x", "", "A" * 43, "%00", "%ff", "A" * 3000):
        with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
            assert events.status == 401
            assert events.headers["www-authenticate"] == "Bearer"


@pytest.mark.http1
def test_one_ticket_opens_one_channel_also_when_two_are_asked_for_at_once(chat: Chat):
    """The row is bound to its channel and read in one statement."""
    therapist = chat.therapist()
    pairs = [chat.pair(therapist) for _ in range(8)]
    ticket = chat.post("/api/chat/ticket", therapist).json()["ticket"]
    socks = [WIRE.connect(chat.port, timeout=10) for _ in pairs]
    try:
        for sock, pair in zip(socks, pairs, strict=True):
            target = f"/api/chat/{pair.channel_id}?ticket={ticket}"
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        statuses = sorted(int(sock.recv(65536).split(b" ")[1]) for sock in socks)
    finally:
        for sock in socks:
            sock.close()
    assert statuses == [200] + [401] * 7


def test_a_refusal_of_a_token_is_audited_without_it(chat: Chat, pair: Pair):
    token = ATTACKER.mint(sub=pair.prospect.clerk_id)
    answer = chat.client.get(
        f"/api/chat/{pair.channel_id}", headers={"authorization": f"Bearer {token}"}
    )
    row = chat.audit(answer.headers["x-request-id"])
    assert row["actor"] is None, "nothing of an unproved token is believed"
    assert (row["action"], row["outcome"], row["detail"]) == (
        "stream",
        "refused",
        "UNAUTHENTICATED",
    )
    assert row["channel_id"] == pair.channel_id
