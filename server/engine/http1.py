"""HTTP/1.1 on plain-text connections, in place of Hypercorn's own: llhttp (`httptools`) parses,
and one task per connection does the rest.

The task reads a request, runs the application, and reads on only when the application asks for
the body or waits for the peer to leave. So a body is read with backpressure, and a quiet stream
has no second task here. TLS and HTTP/2 stay with Hypercorn.

An application may have its streamed response written to the socket without ASGI's `send`: the
extension `sottovoce.direct` in a GET's scope, which other servers do not have.

    stream = scope["extensions"]["sottovoce.direct"]["open"](status, headers)   # plain
    stream.write(chunk)                                                         # see `wire.Wire`

and the body of any other request taken without waiting for it, where it came with its head, as it
nearly always does:

    body = scope["extensions"]["sottovoce.whole_body"]()   # plain; None: ask `receive` for it

RFC 9112 says what is refused. llhttp is strict about framing (two lengths, a length and chunks,
bare LF, folded lines, spaces and NUL in names, sizes out of range); what it lets pass is refused
in `_check_head`.
"""

import ctypes
import gc
import math
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from enum import Enum, auto
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import httptools
import hypercorn.trio.run
import structlog
import trio

from protocol.problems import PROBLEMS
from server.engine.containment import ContainedConnection
from server.engine.wire import Wire
from server.metrics import CONNECTIONS_OPEN, REFUSED_REQUESTS
from server.web.problems import Problem, problem_response
from server.web.request import new_request_id
from storage.failures import describe

Message = dict[str, Any]
App = Callable[..., Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_TARGET_BYTES = 8 * 1024
"""RFC 9112 §3 asks for 8,000 octets at least."""
MAX_HELD_BYTES = 64 * 1024
"""Of later requests, while one is answered: whoever sends more does not wait for answers."""
MAX_FRAMING_BYTES = 16 * 1024
"""Of chunk sizes and extensions, over what the smallest chunks need (RFC 9112 §7.1.1)."""
LINGER_BYTES = 1024 * 1024
LINGER_SECONDS = 2.0
"""Of a body that nobody wanted: a connection that is closed with bytes unread is reset, and the
answer with it (RFC 9112 §9.6)."""
GOODBYE_SECONDS = 1.0
"""For the client of a stream that has ended to leave by itself."""
MAX_TURNED_AWAY = 200
"""Connections over the limit that are told so at one time; further ones are just closed."""
TURN_AWAY_SECONDS = 1.5
"""How long a connection over the limit may take to send its first request and read the answer. An
honest client sends it at once; the rest is for one retransmission."""
SPEAK_SECONDS = 1.0
"""In which an honest client has sent its head, where there is no room for those that do not."""
SWEEP_SECONDS = 0.5
CROWD = 1000
CROWD_GONE_SECONDS = 2.0
"""So many connections are worth a full collection when they have left; for those who are still
there it takes some ms."""
SWEEP_TOGETHER = 8
"""Connections that are ended in one turn, which takes a ms: then others are served."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""RFC 9113 §3.4: HTTP/2 with prior knowledge."""

_TARGET = re.compile(rb"[\x21\x22\x24-\x7e]+")  # visible ASCII without "#"
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [\x21-\x7e]+ HTTP/1\.[01]\r\n")
_ABSOLUTE = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+;=:\[\]-]*")  # RFC 3986 §3.2.2, and a port
_NO_BODY: Final = -1

log = structlog.get_logger("engine")


class Limits(NamedTuple):
    connections: int
    """Open at one time."""
    head_bytes: int = 64 * 1024
    """Target and headers. A session token may have 8 KiB, and a browser's cookies come with it."""
    headers: int = 128
    head_seconds: float = 10.0
    """To the end of the headers from their first byte, and until that from the beginning."""
    silent: int = 4096
    """Connections that have all of that time. Of more, those end that had `SPEAK_SECONDS`: each
    takes 3.5 kB, and Python gives little of it back where others are served meanwhile."""
    idle_seconds: float = 75.0
    """Between requests. Over the usual 60 s of load balancers: whoever sends on an idle
    connection must not find it closed."""
    stall_seconds: float = 20.0
    """That a response waits for a reader that takes nothing."""


class _State(Enum):
    """Of the response."""

    READY = auto()
    STARTED = auto()
    """The application has said how it begins; nothing is written."""
    BODY = auto()
    DIRECT = auto()
    """The application writes it to the wire."""
    ENDED = auto()


class Refused(Exception):
    """No request that will be answered by the application; the connection ends.

    Attributes:
        code: a row of `protocol.problems`.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Engine:
    """All connections of one worker.

    Args:
        app: called as ASGI 3.0.
        full: called in place of `app` for the one request of a connection that there is no room
            for. It alone can tell whether the client gets a status or an event stream that closes.
    """

    def __init__(self, app: App, limits: Limits, *, full: App | None = None) -> None:
        self.app = app
        self._full = full or _refuse_full
        self.limits = limits
        self.draining = False
        """Answers say `connection: close`."""
        self.closed = False
        """Nobody waits for a request any more."""
        self.connections = 0
        # Since when; the oldest first, for all of one kind have the same time.
        self.waiting_for_head: dict[Wire | Connection, float] = {}
        self.idle: dict[Wire | Connection, float] = {}
        self._turned_away = 0
        self._date = b""
        self._date_until = 0.0

    def install(self) -> None:
        """Have Hypercorn's workers of this process serve their connections here."""
        serve: Any = self.serve_connection  # one that is awaited per connection, as theirs
        hypercorn.trio.run.TCPServer = serve  # type: ignore[attr-defined]

    async def serve_connection(
        self, app: Any, config: Any, context: Any, state: Any, stream: Any
    ) -> None:
        """What Hypercorn calls for each connection, in a task of its own; closes nothing.

        Args:
            app, config, context, state: Hypercorn's, for the connections that stay with it.
            stream: accepted just now.
        """
        if not isinstance(stream, trio.SocketStream):
            await ContainedConnection(app, config, context, state, stream)
            return
        wire = Wire(stream)
        if self.connections >= self.limits.connections and not self._make_room():
            await self._turn_away(wire, stream)
            return
        self.connections += 1
        try:
            # Whoever says nothing has this task and a wire, and is not worth a frame or a parser.
            self.waiting_for_head[wire] = trio.current_time()
            try:
                while (first := wire.read_now()) is None:
                    await wire.readable()
            finally:
                self.waiting_for_head.pop(wire, None)
            if not first:
                return
            try:
                connection = Connection(self, wire, stream.socket, first)
            except OSError:
                return  # it was over before it began
            del first  # this frame lives as long as a stream
            if begun := await connection.run():
                again: Any = _Replayed(stream, begun)
                await ContainedConnection(app, config, context, state, again)
        finally:
            self.connections -= 1

    async def sweep(self) -> None:
        """End connections that are over their time, until cancelled."""
        most, few_since = 0, math.inf
        while True:
            # With other clocks, not between: an idle worker pays for each time it wakes up.
            await trio.sleep_until((trio.current_time() // SWEEP_SECONDS + 1) * SWEEP_SECONDS)
            now = trio.current_time()
            most = max(most, self.connections)
            if most < CROWD or self.connections > most // 8:
                few_since = math.inf
            elif few_since is math.inf:
                few_since = now
            elif now - few_since > CROWD_GONE_SECONDS:
                _give_memory_back()
                most = self.connections
            CONNECTIONS_OPEN.set(self.connections)
            for waiting, many, seconds in (
                (self.waiting_for_head, self.limits.silent, self.limits.head_seconds),
                (self.idle, math.inf, self.limits.idle_seconds),
            ):
                ended = 0
                while waiting:
                    connection, since = next(iter(waiting.items()))
                    if now - since < (seconds if len(waiting) <= many else SPEAK_SECONDS):
                        break
                    del waiting[connection]
                    connection.give_up()
                    ended += 1
                    if ended % SWEEP_TOGETHER == 0:
                        await trio.lowlevel.checkpoint()

    def close_idle(self) -> None:
        """End the connections on which nothing is under way. Plain."""
        self.draining = self.closed = True
        for connection in [*self.idle, *self.waiting_for_head]:
            connection.give_up()

    def date(self) -> bytes:
        """The `Date` header's line (RFC 9110 §6.6.1)."""
        now = time.time()
        if now >= self._date_until:
            self._date = b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n"
            self._date_until = int(now) + 1
        return self._date

    def _make_room(self) -> bool:
        """Whoever had time to say something and did not goes first, then the idle: they have been
        clients. The longest silent before the others."""
        now = trio.current_time()
        for waiting, seconds in (
            (self.waiting_for_head, SPEAK_SECONDS),
            (self.idle, 0.0),
            (self.waiting_for_head, 0.0),
        ):
            if waiting:
                connection, since = next(iter(waiting.items()))
                if now - since >= seconds:
                    del waiting[connection]
                    connection.give_up()
                    return True
        return False

    async def _turn_away(self, wire: Wire, stream: trio.SocketStream) -> None:
        """Answer one request, and end."""
        if self._turned_away >= MAX_TURNED_AWAY:
            return
        self._turned_away += 1
        # An engine of its own: what waits there is in nobody's way, and makes nobody room.
        aside = Engine(self._full, self.limits)
        aside.draining = True
        try:
            with trio.move_on_after(TURN_AWAY_SECONDS):
                await wire.readable()
                if first := wire.read_now():
                    await Connection(aside, wire, stream.socket, first).run()
        except OSError:
            pass  # it was over before it began
        finally:
            self._turned_away -= 1


async def _refuse_full(scope: Message, receive: Any, send: Any) -> None:  # noqa: ARG001
    """What is said where the application has no answer of its own."""
    await problem_response(Problem("SERVER_FULL", retry_after=5))(send)


class _Request:
    """What is known of a request while it is read and answered."""

    __slots__ = (
        "body",
        "body_bytes",
        "expects_continue",
        "head_bytes",
        "headers",
        "keep_alive",
        "method",
        "raw_bytes",
        "target",
        "version",
        "whole",
    )

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.version = ""
        self.headers: Headers = []
        self.keep_alive = False
        self.expects_continue = False
        self.head_bytes = 0
        self.body: list[bytes] = []
        """Parsed, and not yet asked for."""
        self.body_bytes = 0
        self.raw_bytes = 0
        """Of reads that did not end the head, or the body."""
        self.whole = False
        """All of it has arrived."""


class Connection:
    """One connection that has said something, to its last byte.

    Args:
        first: what was read of it.

    Raises:
        OSError: it is over already.
    """

    __slots__ = (
        "_answering",
        "_base_scope",
        "_close",
        "_engine",
        "_given",
        "_held",
        "_incoming",
        "_left",
        "_parser",
        "_refusal",
        "_requests",
        "_start",
        "_state",
        "_wire",
    )

    def __init__(
        self, engine: Engine, wire: Wire, socket: trio.socket.SocketType, first: bytes
    ) -> None:
        self._engine = engine
        self._wire = wire
        self._base_scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "scheme": "http",
            "root_path": "",
            "client": _address(socket.getpeername()),
            "server": _address(socket.getsockname()),
        }
        self._parser: Any = httptools.HttpRequestParser(self)
        self._requests: list[_Request] = []
        """With whole heads, not yet answered: as many as one read brought."""
        self._incoming: _Request | None = None
        """Its head, or its body, is still arriving."""
        self._refusal: str | None = None
        self._held = first
        """Read, not yet parsed: with the connection, or while a request was answered."""
        self._answering: _Request | None = None
        self._given = False
        """The application has been given all of the body."""
        self._close = False
        self._state = _State.ENDED
        self._start: Message | None = None
        self._left: int | None = None
        """Bytes of the response's body that its length promises; None: it comes in chunks, or
        ends with the connection."""

    async def run(self) -> bytes:
        """Answer requests until the connection ends. Never raises for what a peer did.

        Returns:
            Empty; or what has been read of a connection that speaks HTTP/2.
        """
        try:
            self._held = await self._enough(self._held)
            if self._held.startswith(PREFACE[:16]):
                return self._held
            while await self._next_request():
                await self._answer()
                if self._close or self._wire.gone:
                    if self._state is _State.ENDED:
                        await _linger(self._wire, seconds=LINGER_SECONDS)
                    break
            if self._refusal is not None and not self._wire.gone:
                await self._refuse(self._refusal)
        except Exception as error:
            log.warning("connection_failed", **describe(error))
        finally:
            self._parser = None  # it refers to us
            self._engine.idle.pop(self, None)
            self._engine.waiting_for_head.pop(self, None)
        return b""

    def give_up(self) -> None:
        """End the wait for a request: it took too long, or its place is needed. Plain."""
        self._engine.idle.pop(self, None)
        self._engine.waiting_for_head.pop(self, None)
        if self._incoming is not None:
            self._refusal = "REQUEST_TIMEOUT"
        self._wire.give_up()

    # Reading

    async def _enough(self, data: bytes) -> bytes:
        """To tell HTTP/2 from HTTP/1.1."""
        self._engine.waiting_for_head[self] = trio.current_time()
        while len(data) < 16 and PREFACE.startswith(data):
            more = await self._read()
            if not more:
                break
            data += more
        return data

    async def _read(self) -> bytes:
        """What arrives next; empty at the end, and then the wire is gone."""
        while (data := self._wire.read_now()) is None:
            await self._wire.readable()
        if not data:
            self._wire.gone = self._refusal is None
        return data

    async def _next_request(self) -> bool:
        """Whether there is one more to answer, whose head is whole."""
        engine, waited = self._engine, False
        while True:
            if self._requests:
                engine.idle.pop(self, None)
                engine.waiting_for_head.pop(self, None)
                if not waited:
                    await trio.lowlevel.checkpoint()
                self._answering = self._requests.pop(0)
                return True
            if self._refusal is not None or self._wire.gone:
                return False
            if self._held:
                data, self._held = self._held, b""
            else:
                if self._incoming is None:
                    if engine.closed:
                        return False
                    if self not in engine.waiting_for_head:
                        engine.idle.setdefault(self, trio.current_time())  # empty lines are nothing
                elif self not in engine.waiting_for_head:
                    engine.idle.pop(self, None)
                    engine.waiting_for_head[self] = trio.current_time()
                waited = True
                await self._wire.readable()  # it is hardly ever there yet, and asking costs a call
                data = await self._read()
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        """Parse; what is wrong is kept until the requests before it have been answered."""
        if not data:
            return
        unfinished = self._incoming
        in_body = unfinished is not None and unfinished.method != ""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserInvalidMethodError:
            junk = _REQUEST_LINE.match(data) is None  # then it is no method at all
            self._refusal = "BAD_REQUEST" if junk else "METHOD_UNKNOWN"
        except httptools.HttpParserError as error:
            inner = error.__context__
            code = "METHOD_UNKNOWN" if self._is_connect() else "BAD_REQUEST"
            self._refusal = inner.code if isinstance(inner, Refused) else code
        if unfinished is not None and unfinished is self._incoming:
            # A line that does not end never comes out of the parser.
            unfinished.raw_bytes += len(data)
            if not in_body:
                if unfinished.raw_bytes > self._engine.limits.head_bytes:
                    self._refusal = "HEADERS_TOO_LARGE"
            elif unfinished.raw_bytes - 8 * unfinished.body_bytes > MAX_FRAMING_BYTES:
                self._refusal = "BAD_REQUEST"

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Begin again without it (RFC 9110 §7.8): for llhttp what follows the head, a body too,
        is of another protocol. What follows the body may be so; it is not read."""
        request = self._requests.pop()
        headers = [
            (name, value)
            for name, value in request.headers
            if name not in (b"upgrade", b"connection")
        ]
        line = f"{request.method} ".encode() + request.target + f" HTTP/{request.version}".encode()
        fields = [b"%b: %b" % header for header in [*headers, (b"connection", b"close")]]
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([line, *fields, b"", rest]))

    def _is_connect(self) -> bool:
        incoming = self._incoming
        if incoming is None or incoming.method:
            return False
        method: bytes = self._parser.get_method()
        return method == b"CONNECT"

    # What httptools calls; an exception here is the `__context__` of the parser's own.

    def on_message_begin(self) -> None:
        self._incoming = _Request()

    def on_url(self, data: bytes) -> None:
        request = self._incoming
        assert request is not None
        request.target += data
        request.head_bytes += len(data)
        if len(request.target) > MAX_TARGET_BYTES:
            raise Refused("URI_TOO_LONG")

    def on_header(self, name: bytes, value: bytes) -> None:
        request, limits = self._incoming, self._engine.limits
        assert request is not None
        request.head_bytes += len(name) + len(value) + 4
        if request.head_bytes > limits.head_bytes or len(request.headers) >= limits.headers:
            raise Refused("HEADERS_TOO_LARGE")
        if not request.method:  # else it is a trailer, which nobody here needs
            request.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        request = self._incoming
        assert request is not None
        request.version = self._parser.get_http_version()
        request.keep_alive = self._parser.should_keep_alive()
        request.raw_bytes = 0
        method = self._parser.get_method().decode("ascii")
        _check_head(request, method)
        request.method = method
        self._requests.append(request)

    def on_body(self, data: bytes) -> None:
        request = self._incoming
        assert request is not None
        request.body.append(data)
        request.body_bytes += len(data)

    def on_message_complete(self) -> None:
        request, self._incoming = self._incoming, None
        assert request is not None
        request.whole = True

    # Answering

    async def _answer(self) -> None:
        """Run the application for a request. Nothing here holds it meanwhile: a stream may live
        for hours."""
        assert self._answering is not None
        self._given = False
        self._state = _State.READY
        self._close = not self._answering.keep_alive
        try:
            await self._engine.app(self._scope(), self._receive, self._send)
        except Exception as error:
            log.warning("application_failed", **describe(error))
            if self._state is _State.DIRECT:
                self._wire.abort()
        answered, self._answering = self._answering, None
        if self._state is _State.DIRECT:
            self._close = True
            if not self._wire.gone:
                await _linger(self._wire, seconds=GOODBYE_SECONDS)
        elif self._state is _State.READY:
            self._close = True
            assert answered is not None
            if answered.whole or self._refusal is None:  # else its body makes no sense
                self._refusal = "INTERNAL"
        elif self._state is not _State.ENDED:
            self._close = True
            self._wire.abort()  # what the client has must not look whole to it

    def _scope(self) -> Message:
        request = self._answering
        assert request is not None
        raw_path, _, query = request.target.partition(b"?")
        path = raw_path.decode("ascii")
        scope = {
            **self._base_scope,
            "http_version": request.version,
            "method": request.method,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": request.headers,
        }
        if request.method == "GET":
            scope["extensions"] = {"sottovoce.direct": {"open": self._open_direct}}
        else:
            scope["extensions"] = {"sottovoce.whole_body": self._whole_body}
        return scope

    def _whole_body(self) -> bytes | None:
        """For the application: the body, once, if all of it has arrived. Plain."""
        request = self._answering
        if request is None or not request.whole or self._given:
            return None
        self._given = True
        body = b"".join(request.body)
        request.body.clear()
        return body

    async def _receive(self) -> Message:
        """ASGI's: the body in parts, then the peer's leaving."""
        request = self._answering
        while request is not None and not self._wire.gone and self._state is not _State.ENDED:
            if not self._given and (request.body or request.whole):
                body = b"".join(request.body)
                request.body.clear()
                self._given = request.whole
                return {"type": "http.request", "body": body, "more_body": not request.whole}
            if self._refusal is not None and not request.whole:
                break  # the rest of its body makes no sense
            if request.expects_continue:
                request.expects_continue = False
                if self._state is _State.READY:
                    self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            data = await self._read()
            if request.whole:
                self._held += data
                self._wire.gone |= len(self._held) > MAX_HELD_BYTES
            else:
                self._feed(data)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """ASGI's: a head goes out with the first of its body."""
        kind, state = message["type"], self._state
        if kind == "http.response.start" and state is _State.READY:
            self._start, self._state = message, _State.STARTED
        elif kind == "http.response.body" and (state is _State.STARTED or state is _State.BODY):
            more = message.get("more_body", False)
            data = self._frame(message.get("body", b""), more=more)
            self._state = _State.BODY if more else _State.ENDED
            if data and not self._wire.gone and not self._wire.write(data):
                await self._flush()
            elif more:
                await trio.lowlevel.checkpoint()
        else:
            raise RuntimeError("ASGI messages out of order")

    async def _flush(self) -> None:
        try:
            await self._wire.flush(seconds=self._engine.limits.stall_seconds)
        except trio.TooSlowError:
            self._wire.abort()

    def _frame(self, body: bytes, *, more: bool) -> bytes:
        """A part of a response's body as it goes on the wire, its head before the first."""
        head = b""
        if (start := self._start) is not None:
            length = None if more else len(body)
            head = self._head(start["status"], start.get("headers", ()), length=length)
            self._start = None
        request = self._answering
        if request is None or request.method == "HEAD" or self._left == _NO_BODY:
            return head
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left > 0 and not more):
                raise RuntimeError("the body is not as long as its head says")
            return head + body
        if not self._wire.chunked:
            return head + body
        if body:
            head += b"%x\r\n%b\r\n" % (len(body), body)
        return head if more else head + b"0\r\n\r\n"

    def _head(self, status: int, headers: Any, *, length: int | None) -> bytes:
        """Status line and headers; decides how the body is framed."""
        request, wire = self._answering, self._wire
        assert request is not None
        lines = [_status_line(status), self._engine.date()]
        declared: int | None = None
        for name, value in headers:
            if name == b"content-length":
                declared = int(value)
            elif name == b"connection":
                self._close |= b"close" in value.lower()
                continue
            elif name == b"transfer-encoding":
                continue
            lines.append(name + b": " + value + b"\r\n")
        wire.chunked = False
        if status < 200 or status in (204, 304):
            self._left = _NO_BODY
        elif declared is not None:
            self._left = declared
        elif length is not None:
            self._left = length
            lines.append(b"content-length: %d\r\n" % length)
        else:
            self._left = None
            if request.version == "1.1":
                wire.chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self._close = True
        self._close |= self._engine.draining
        if not request.whole:
            self._close = True  # where its body ends nobody may ever know
        if self._close:
            lines.append(b"connection: close\r\n")
        elif request.version == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a response header has a line break")
        return head

    def _open_direct(self, status: int, headers: Headers) -> Wire:
        """Begin a response that the application writes to the wire; the connection ends with it.

        Its head goes out with the first write. From here on nothing is kept of the request.
        """
        if self._state is not _State.READY:
            raise RuntimeError("ASGI messages out of order")
        self._close = True
        self._wire.hold(self._head(status, headers, length=None))
        self._state = _State.DIRECT
        self._answering = self._incoming = None
        self._requests.clear()
        self._held = b""
        self._parser = None
        self._base_scope = {}
        return self._wire

    async def _refuse(self, code: str) -> None:
        """Answer what never reached the application, and stay until the client has read it."""
        request_id = new_request_id()
        status = PROBLEMS[code].status
        REFUSED_REQUESTS.labels(code).inc()
        log.info(
            "request",
            route="unknown",
            method="other",
            status=status,
            code=code,
            request_id=request_id,
        )
        self._wire.write(_refusal(code, self._engine.date(), request_id=request_id))
        await self._flush()
        await _linger(self._wire, seconds=LINGER_SECONDS)


class _Replayed:
    """A stream of which something has been read already, for Hypercorn."""

    def __init__(self, stream: trio.SocketStream, first: bytes) -> None:
        self._stream = stream
        self._first = first
        self.socket = stream.socket
        self.send_all = stream.send_all
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose

    async def receive_some(self, max_bytes: int) -> bytes:
        if self._first:
            await trio.lowlevel.checkpoint()
            first, self._first = self._first[:max_bytes], self._first[max_bytes:]
            return first
        return await self._stream.receive_some(max_bytes)


def _check_head(request: _Request, method: str) -> None:
    """What llhttp lets pass; resolves an absolute target.

    Raises:
        Refused
    """
    if request.version not in ("1.0", "1.1"):
        raise Refused("HTTP_VERSION")
    if method == "CONNECT":
        raise Refused("METHOD_UNKNOWN")
    hosts = 0
    for name, value in request.headers:
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                raise Refused("BAD_REQUEST")
        elif name == b"transfer-encoding":
            # RFC 9112 §6.1: before 1.1 its framing is faulty, and we know no other coding.
            if request.version == "1.0" or value.lower() != b"chunked":
                raise Refused("BAD_REQUEST")
        elif name == b"expect":
            # RFC 9110 §10.1.1: before 1.1 nobody waits for it.
            request.expects_continue = request.version != "1.0" and value.lower() == b"100-continue"
    if hosts > 1 or (hosts == 0 and request.version == "1.1"):
        raise Refused("BAD_REQUEST")  # RFC 9112 §3.2
    target = request.target
    if _TARGET.fullmatch(target) is None:
        raise Refused("BAD_REQUEST")
    if target.startswith(b"/") or (target == b"*" and method == "OPTIONS"):
        return
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise Refused("BAD_REQUEST")
    # RFC 9112 §3.2.2: what the target says of the host counts.
    request.headers = [(name, value) for name, value in request.headers if name != b"host"]
    request.headers.insert(0, (b"host", absolute[1]))
    request.target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]


def _give_memory_back() -> None:
    """What was a crowd's: some ms.

    What Python keeps for the next ones holds on to memory until a full collection, and the worker
    has set those to come almost never. glibc keeps whole pages between others until it is told.
    """
    gc.collect()
    if _trim is not None:
        _trim(0)


_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""malloc_trim(3): glibc's alone."""


@lru_cache(maxsize=64)
def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def _refusal(code: str, date: bytes, *, request_id: str) -> bytes:
    """A whole response, after which the connection ends."""
    response = problem_response(Problem(code))
    headers = [
        *response.headers,
        (b"connection", b"close"),
        (b"x-request-id", request_id.encode()),
    ]
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"".join([_status_line(response.status), date, *lines, b"\r\n", response.body])


async def _linger(wire: Wire, *, seconds: float) -> None:
    """Take in what the peer still sends, within limits, so that it reads what it was told."""
    wire.half_close()
    size = 0
    with trio.move_on_after(seconds):
        while size < LINGER_BYTES:
            await wire.readable()
            data = wire.read_now()
            if data == b"":
                break
            size += len(data or b"")
    wire.gone = True


def _address(name: Any) -> tuple[str, int] | None:
    """ASGI's form of what the socket says."""
    return (name[0], name[1]) if isinstance(name, tuple) else None
