"""What a request carries to say who asks: read from an ASGI scope, believed elsewhere.

Nothing here knows what makes a token or a ticket valid. Bearer header, then cookie, then
ticket: the first that is there counts, and a bad one is not made good by the next. Of several
session cookies the next is tried where the one before is genuine and has merely expired: browsers
keep old ones beside new ones (of another path, of a parent domain, or under Clerk's other name),
and send both. A forged one is refused whatever follows it: somebody tampers, and that must show.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Iterable
from typing import Literal
from urllib.parse import parse_qsl, unquote_plus

from protocol.confidential import Confidential

Headers = Iterable[tuple[bytes, bytes]]
"""As in an ASGI scope: names in lower case."""

MAX_QUERY_BYTES = 4 * 1024
"""The longest that the contract needs is a ticket and a cursor: well under 200."""

MAX_SESSION_COOKIES = 4
"""How many are tried: two names, each for the host and its parent domain. Each costs a check of its
signature, some 30 µs."""

TOKEN_PARAMETERS = frozenset(
    {"token", "access_token", "jwt", "session", "__session", "authorization"}
)

_B64TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 §2.1
# A part begins with `eyJ`: the base64 of `{"`. The look-behind keeps the search linear.
_JWT = re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class BadCredential(Exception):
    """A credential that cannot be read: doubled, malformed, or too long to look through."""


class TokenInUrl(Exception):
    """The query string holds what looks like a session token.

    URLs end up in histories, referrers and the logs of every proxy, so the token is refused
    even where a good credential stands beside it: the client must not get used to it.
    """


class Credential(Confidential, frozen=True):
    """Not yet believed."""

    kind: Literal["bearer", "cookie", "ticket"]
    value: str


def find_credentials(
    headers: Headers, query_string: bytes, *, publishable_key: str, allow_ticket: bool
) -> list[Credential]:
    """The credentials of a request, in the order in which they are tried: one, or some cookies.

    An `Authorization` of another scheme is not ours (a staging site's Basic, say) and is passed
    over.

    Args:
        headers: of the request.
        query_string: as it came, percent-encoded.
        publishable_key: Clerk's; names the suffixed cookie.
        allow_ticket: whether `?ticket=` counts here.

    Returns:
        An empty list where there is none.

    Raises:
        TokenInUrl: whatever else there is.
        BadCredential: two Authorization headers, one that is malformed, two tickets, or a query
            string over `MAX_QUERY_BYTES`, in which a token could hide.
    """
    ticket = _read_query(query_string)
    fields = list(headers)
    authorizations = [value for name, value in fields if name == b"authorization"]
    if len(authorizations) > 1:
        raise BadCredential
    if authorizations and (bearer := _bearer(authorizations[0])) is not None:
        return [Credential("bearer", bearer)]
    cookies = parse_cookies(value for name, value in fields if name == b"cookie")
    sessions = [
        value
        for name in (f"__session_{cookie_suffix(publishable_key)}", "__session")
        for value in cookies.get(name, ())
        if value  # an empty one is what signing out leaves behind
    ]
    if sessions:
        tried = list(dict.fromkeys(sessions))[:MAX_SESSION_COOKIES]
        return [Credential("cookie", value) for value in tried]
    return [Credential("ticket", ticket)] if allow_ticket and ticket else []


def _bearer(authorization: bytes) -> str | None:
    scheme, _, value = authorization.strip(b" \t").partition(b" ")
    value = value.lstrip(b" ")
    if not value:
        raise BadCredential
    if scheme.lower() != b"bearer":
        return None
    if _B64TOKEN.fullmatch(value) is None:
        raise BadCredential
    return value.decode("ascii")


def _read_query(query_string: bytes) -> str:
    """The ticket, or an empty string."""
    if not query_string:
        return ""
    if len(query_string) > MAX_QUERY_BYTES:
        raise BadCredential
    raw = query_string.decode("latin-1")
    # The whole of it: a token may also stand in a name, or after a separator of its own.
    if _JWT.search(unquote_plus(raw)):
        raise TokenInUrl
    tickets = []
    for name, value in parse_qsl(raw, keep_blank_values=True):
        if name.strip().lower() in TOKEN_PARAMETERS:
            raise TokenInUrl
        if name == "ticket":
            tickets.append(value)
    if len(tickets) > 1:
        raise BadCredential
    return tickets[0] if tickets else ""


@functools.lru_cache(maxsize=8)
def cookie_suffix(publishable_key: str) -> str:
    """What Clerk appends to the cookies of one of several applications on one domain."""
    digest = hashlib.sha1(publishable_key.encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).decode()[:8]


def parse_cookies(values: Iterable[bytes]) -> dict[str, list[str]]:
    """Cookies by name, as RFC 6265 §5.4 writes them; those of one name in their order.

    Args:
        values: of the Cookie headers. HTTP/2 may split them (RFC 9113 §8.2.3).
    """
    cookies: dict[str, list[str]] = {}
    for pair in b";".join(values).decode("latin-1").split(";"):
        name, equals, value = pair.partition("=")
        if equals:
            cookies.setdefault(name.strip(" \t"), []).append(value.strip(" \t"))
    return cookies


def origin_matches(headers: Headers, *, allowed_origins: Iterable[str]) -> bool:
    """Whether a page of ours made this request: for a POST whose credential is a cookie.

    `Sec-Fetch-Site: same-origin` is enough. It is the browser's own word, which no page can set
    (Fetch Standard, "forbidden request-header"), about the origin that the browser itself sees: a
    proxy that rewrites Host, as Next.js and Vite do, cannot spoil it. It counts where it stands
    once and to the letter.

    In every other case there must be one Origin. It is one of `allowed_origins`, or its host and
    port are those of the Host header. The scheme is not compared with ours: behind a proxy that
    terminates TLS we only see http. `null` is nobody's origin.
    """
    fields = list(headers)
    if [value for name, value in fields if name == b"sec-fetch-site"] == [b"same-origin"]:
        return True
    origins = [value for name, value in fields if name == b"origin"]
    hosts = {value for name, value in fields if name in (b"host", b":authority")}
    if len(origins) != 1 or (origin := _split_origin(origins[0].decode("latin-1"))) is None:
        return False
    if any(origin == _split_origin(allowed) for allowed in allowed_origins):
        return True
    if len(hosts) != 1:
        return False
    scheme, _ = origin
    return origin == _split_origin(f"{scheme}://{hosts.pop().decode('latin-1')}")


def is_foreign_page(headers: Headers, *, allowed_origins: Iterable[str]) -> bool:
    """Whether the browser says that a page which is not ours made this request: for a stream,
    a GET, whose credential is a cookie. Opening one may end an older stream of the same person, so
    no other site may do it with their cookie.

    A browser names the Origin of a GET only where it is not the page's own, and older ones do not
    send `Sec-Fetch-Site`; a request that says nothing comes from a page of ours, or from no page.
    """
    fields = list(headers)
    if any(name == b"origin" for name, _ in fields):
        return not origin_matches(fields, allowed_origins=allowed_origins)
    sites = [value for name, value in fields if name == b"sec-fetch-site"]
    return sites not in ([], [b"same-origin"], [b"none"])  # none: typed, or a bookmark


def _split_origin(origin: str) -> tuple[str, str] | None:
    """(scheme, host and port), in lower case, without the scheme's default port."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return None
    scheme, host, port = match.groups()
    return scheme, host if port == _DEFAULT_PORTS[scheme] else host + (port or "")
