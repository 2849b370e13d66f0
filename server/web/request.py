"""A request as the handlers see it: ASGI's scope, and its body within limits."""

import ipaddress
import os
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qsl

import trio

from server.web.problems import Problem
from server.web.response import EVENT_STREAM
from storage.contract import Origin

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_QUERY_FIELDS: Final = 32
LINGER_SECONDS: Final = 2.0
_ADDRESS: Final = re.compile(
    r"\[([0-9a-fA-F:.]+)(?:%[^\]]*)?\](?::[0-9]*)?"  # in brackets, with or without a port
    r"|([0-9.]+)(?::[0-9]*)?"  # IPv4, with or without a port
    r"|([0-9a-fA-F:.]+)(?:%.*)?"  # IPv6: without brackets there is no telling a port
)
_UNWANTED: Final = re.compile(rb"q\s*=\s*0(\.0{0,3})?")
"""A weight of nothing (RFC 9110 §12.4.2)."""
LINGER_BYTES: Final = 8 * 1024 * 1024
"""How much of a body that nobody wants is taken in, so that its sender reads the answer."""


class Request:
    """One HTTP request.

    Attributes:
        id: ours, for logs, the audit row and the `X-Request-Id` header; the client has no say.
        path_id: the number in the path of a stream, else None.
        subject, impersonator: the Clerk `sub` and `act.sub`; these and `user_id` and `channel_id`
            are filled in as they become known, for the log and the audit.
        seq: the number of the message that it stored, for the log.
    """

    __slots__ = (
        "_ended",
        "_fields",
        "_receive",
        "_scope",
        "channel_id",
        "id",
        "impersonator",
        "method",
        "path_id",
        "seq",
        "subject",
        "user_id",
    )

    def __init__(self, scope: Scope, receive: Receive, *, path_id: int | None) -> None:
        self._scope = scope
        self._receive = receive
        self._ended = False
        self._fields: dict[bytes, bytes] | None = None
        self.id = new_request_id()
        self.method: str = scope["method"]
        self.path_id = path_id
        self.subject: str | None = None
        self.impersonator: str | None = None
        self.user_id: int | None = None
        self.channel_id: int | None = None
        self.seq: int | None = None

    def __repr__(self) -> str:
        return f"<Request {self.id}>"

    @property
    def receive(self) -> Receive:
        return self._receive

    @property
    def direct(self) -> dict[str, Any] | None:
        """The ASGI extension `sottovoce.direct` (see `server.engine.http1`), where there is one."""
        direct: dict[str, Any] | None = self._scope.get("extensions", {}).get("sottovoce.direct")
        return direct

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self._scope["headers"]
        return headers

    @property
    def query_string(self) -> bytes:
        raw: bytes = self._scope.get("query_string", b"")
        return raw

    def header(self, name: bytes) -> bytes | None:
        """The header of a lower-case name; several count as one list (RFC 9110 §5.3), which is
        no content type, cursor or key: a second one can override nothing."""
        fields = self._fields
        if fields is None:
            fields = self._fields = {}
            for key, value in self.headers:
                fields[key] = fields[key] + b", " + value if key in fields else value
        return fields.get(name)

    @property
    def asks_for_events(self) -> bool:
        """Whether it asks for an event stream by name, as every `EventSource` does; `*/*` takes
        anything and asks for nothing (RFC 9110 §12.5.1)."""
        accept = self.header(b"accept")
        return accept is not None and any(map(_is_event_stream, accept.lower().split(b",")))

    @property
    def framed_twice(self) -> bool:
        """Whether it says in two ways where its body ends, which no honest client does: so
        requests are smuggled past a proxy that believes the other way (RFC 9112 §6.1)."""
        return (
            self.header(b"content-length") is not None
            and self.header(b"transfer-encoding") is not None
        )

    def query(self, name: str) -> str | None:
        """The first query parameter of a name.

        Raises:
            Problem: INVALID_QUERY, there are far too many.
        """
        if not self.query_string:
            return None
        try:
            fields = parse_qsl(
                self.query_string.decode("latin-1"),
                keep_blank_values=True,
                max_num_fields=MAX_QUERY_FIELDS,
            )
        except ValueError:
            raise Problem("INVALID_QUERY") from None
        return next((value for key, value in fields if key == name), None)

    def address(self, *, hops: int) -> str | None:
        """Where the request came from, as PostgreSQL's `inet` takes it.

        Args:
            hops: trusted proxies, each of which appended the address that it saw. An empty part
                counts as one: else what a client wrote itself would move into its place.
        """
        if hops:
            listed = [
                part
                for key, value in self.headers
                if key == b"x-forwarded-for"
                for part in value.decode("latin-1").split(",")
            ]
            if len(listed) >= hops and (address := read_address(listed[-hops])) is not None:
                return address
        client = self._scope.get("client")
        return read_address(client[0]) if client else None

    def origin(self, *, hops: int) -> Origin:
        """Who asks and from where, as far as is known by now."""
        return Origin(
            actor=self.subject,
            impersonator=self.impersonator,
            user_id=self.user_id,
            address=self.address(hops=hops),
            request_id=self.id,
        )

    async def json_bytes(self, *, limit: int, seconds: float) -> bytes:
        """The body of a JSON request.

        Args:
            limit: bytes; a longer one is not read to its end.
            seconds: to its end.

        Raises:
            Problem: UNSUPPORTED_MEDIA_TYPE, BODY_TOO_LARGE, REQUEST_TIMEOUT.
        """
        content_type = (self.header(b"content-type") or b"").split(b";")[0].strip().lower()
        if content_type != b"application/json":
            raise Problem("UNSUPPORTED_MEDIA_TYPE")
        if (self.header(b"content-encoding") or b"identity").strip().lower() != b"identity":
            raise Problem("UNSUPPORTED_MEDIA_TYPE", detail="The body must not be compressed.")
        length = self.header(b"content-length") or b"0"
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise Problem("BODY_TOO_LARGE", limit=limit)
        if (whole := self._whole_body()) is not None:
            if len(whole) > limit:
                raise Problem("BODY_TOO_LARGE", limit=limit)
            return whole
        parts: list[bytes] = []
        size = 0
        with trio.move_on_after(seconds):
            while True:
                parts.append(await self._next_part())
                size += len(parts[-1])
                if size > limit:
                    raise Problem("BODY_TOO_LARGE", limit=limit)
                if self._ended:
                    return b"".join(parts)
        self._ended = True  # for us: it had its time
        raise Problem("REQUEST_TIMEOUT")

    def _whole_body(self) -> bytes | None:
        """The body, if the server has all of it: then nobody waits, and no clock is needed."""
        ask = self._scope.get("extensions", {}).get("sottovoce.whole_body")
        body: bytes | None = ask() if ask is not None else None
        if body is not None:
            self._ended = True
        return body

    @property
    def unread(self) -> bool:
        """Whether some of its body is still to come."""
        return not self._ended and not (
            self.header(b"content-length") is None and self.header(b"transfer-encoding") is None
        )

    async def discard(self) -> None:
        """Take in the rest of the body and forget it, within limits.

        A connection that is closed while there is something to read is reset, and a reset
        takes away the answer from under a client that is still sending (RFC 9112 §9.6).
        """
        size = 0
        with trio.move_on_after(LINGER_SECONDS):
            try:
                while self.unread and size < LINGER_BYTES:
                    size += len(await self._next_part())
            except PeerLeft:
                pass

    async def _next_part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._ended = True
            raise PeerLeft
        self._ended = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part


def new_request_id() -> str:
    """For logs, the audit row and the `X-Request-Id` header."""
    return os.urandom(8).hex()


class PeerLeft(Exception):
    """The client is gone before its request was whole; nobody waits for an answer."""


def _is_event_stream(part: bytes) -> bool:
    """Whether a part of an Accept header, in lower case, names event streams and wants them."""
    kind, *parameters = [each.strip() for each in part.split(b";")]
    return kind == EVENT_STREAM and not any(map(_UNWANTED.fullmatch, parameters))


@lru_cache(maxsize=1024)  # those of the load balancer, mostly
def read_address(text: str) -> str | None:
    """The IP address that a socket or a proxy names, in its one spelling.

    Proxies also write `192.0.2.7:443` and `[2001:db8::1]:443`. A zone (`fe80::1%eth0`) says
    something to its own machine alone, and PostgreSQL's `inet` refuses it; an IPv4 address that a
    dual-stack socket shows as `::ffff:192.0.2.7` is that IPv4 address.

    Returns:
        None for anything else: `unknown`, an obfuscated name, a Unix socket's path, nothing.
    """
    found = _ADDRESS.fullmatch(text.strip(" \t"))
    if found is None:
        return None
    try:
        address = ipaddress.ip_address(found[1] or found[2] or found[3])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)


def origin_header(request: Request) -> str | None:
    raw = request.header(b"origin")
    return None if raw is None else raw.decode("latin-1")
