"""`GET /api/chat/<channelId>`: a channel's messages as they come, as Server-Sent Events."""

import math
import random
import time

import structlog
import trio

from protocol.closing import ClosingReason, least_pause
from protocol.cursors import MAX_SEQ, Cursor, CursorError, parse_cursor
from server.auth.access import Permit
from server.auth.clerk import Claims
from server.live.connection import Connection, EndedEarly, Lease
from server.live.wire import AsgiWire, Wire
from server.metrics import STREAM_SECONDS, STREAMS_OPEN
from server.service import MIN_LEASE_SHARE, Service
from server.web.problems import Problem
from server.web.request import Request
from server.web.response import COMMON, EVENT_STREAM, UNBUFFERED, Headers, Life, Send
from storage.audit import AuditRow
from storage.contract import ChannelGone, Origin

log = structlog.get_logger("live")

EARLY_ENDS = {
    ClosingReason.DRAIN: "DRAINING",
    ClosingReason.CHAT_DISABLED: "NOT_FOUND",
    ClosingReason.TOO_MANY_STREAMS: "TOO_MANY_STREAMS",
}
"""The problem of a stream that is ended before its response has begun; for any other reason it is
UNAVAILABLE, and the next attempt finds out."""

TURN_SECONDS = 15.0
"""That a new stream waits for others to open: a client that is sent away comes back with more."""

HEADERS = ((b"content-type", EVENT_STREAM), UNBUFFERED, *COMMON)


class EventStream:
    """The response: runs for as long as the stream lives."""

    def __init__(
        self,
        service: Service,
        request: Request,
        claims: Claims,
        permit: Permit,
        cursor: Cursor | None,
    ) -> None:
        self._service = service
        self._request = request
        self._claims = claims
        self._permit = permit
        self._cursor = cursor

    async def __call__(self, send: Send, extra: Headers = ()) -> Life:
        service, request, permit = self._service, self._request, self._permit
        headers = [*HEADERS, *extra]

        def begin() -> Wire:
            if request.direct is not None:
                wire: Wire = request.direct["open"](200, headers)
                return wire
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            return AsgiWire(send, request.receive, start=start)

        await self._take_turn()
        try:
            connection = self._connection()
            await connection.open(cursor=self._after(), head=permit.channel.head, begin=begin)
        except EndedEarly as ended:
            code = EARLY_ENDS.get(ended.reason, "UNAVAILABLE")
            pause = math.ceil(least_pause(ended.reason, 1000) / 1000)
            raise Problem(code, retry_after=pause) from None
        except ChannelGone:
            raise Problem("NOT_YOUR_CHANNEL") from None
        finally:
            service.opening.release()
        self._end_oldest()
        origin = request.origin(hops=service.settings.forwarded_hops)
        return _OpenStream(service, connection, origin, permit.role).run

    def _after(self) -> int | None:
        """The number to resume after."""
        if self._cursor is None:
            return None
        if self._cursor.epoch == self._service.store.epoch:
            return self._cursor.seq
        # Of another epoch, so of no past that we know: ahead of everything, which is a reset.
        return MAX_SEQ

    def _connection(self) -> Connection:
        service, permit = self._service, self._permit
        settings, channel_id = service.settings, permit.channel.channel_id
        now = trio.current_time()
        session = self._claims.expires_at - time.time()
        lease = settings.session_lease_seconds * random.uniform(MIN_LEASE_SHARE, 1.0)
        max_age = settings.max_age_seconds * random.uniform(0.9, 1.0)
        return Connection(
            channel_id=channel_id,
            user_id=permit.user.id,
            subject=self._claims.subject,
            hub=service.hub,
            store=service.store,
            clock=service.clock,
            limits=service.stream_limits,
            lease=min(
                Lease(now + max_age, ClosingReason.MAX_AGE),
                Lease(now + session + lease, ClosingReason.SESSION_ENDED),
            ),
        )

    async def _take_turn(self) -> None:
        """Wait until few enough others are opening; to be released then.

        Raises:
            Problem: there is no room, the wait is too long, or access was lost meanwhile.
            StoreUnavailable: nobody can tell whether it was.
        """
        opening, waited = self._service.opening, False
        try:
            opening.acquire_nowait()
        except trio.WouldBlock:
            waited = True
            with trio.move_on_after(TURN_SECONDS) as scope:
                await opening.acquire()
            if scope.cancelled_caught:
                raise Problem("UNAVAILABLE", retry_after=5) from None
        try:
            if waited:  # until it is attached to the hub, no eviction finds it
                channel_id = self._permit.channel.channel_id
                self._permit = await self._service.permit(self._request, channel_id)
            self._require_room()
        except BaseException:
            opening.release()
            raise

    def _require_room(self) -> None:
        service, settings = self._service, self._service.settings
        if service.draining:
            raise Problem("DRAINING", retry_after=1)
        if service.hub.streams >= settings.max_streams:
            raise Problem("SERVER_FULL", retry_after=5)

    def _end_oldest(self) -> None:
        """Make this stream's person have no more streams than allowed. Plain.

        It has begun by now: an attempt that fails costs nobody their stream. The oldest goes and
        not this one, because a phone that vanished behind a proxy counts for minutes.
        """
        streams = self._service.hub.streams_of(self._permit.user.id)
        for stream in streams[: -self._service.settings.max_streams_per_user]:
            stream.end(ClosingReason.TOO_MANY_STREAMS)


class _OpenStream:
    """What is kept of a request while its stream is open: who, for the log and the audit."""

    __slots__ = ("_connection", "_origin", "_role", "_service", "_since")

    def __init__(self, service: Service, connection: Connection, origin: Origin, role: str) -> None:
        self._service = service
        self._connection = connection
        self._origin = origin
        self._role = role
        self._since = trio.current_time()

    async def run(self) -> None:
        STREAMS_OPEN.inc()
        self._service.streams += 1
        self._note("stream_opened")
        log.info("stream_opened", **self._ids())
        try:
            await self._connection.live()
        finally:
            STREAMS_OPEN.dec()
            self._service.streams -= 1
            ended = self._connection.reason
            reason = ended.value if ended else "peer_left"
            lived = trio.current_time() - self._since
            STREAM_SECONDS.labels(reason).observe(lived)
            self._note("stream_closed", detail=reason)
            log.info("stream_closed", reason=reason, seconds=round(lived, 3), **self._ids())

    def _note(self, action: str, *, detail: str | None = None) -> None:
        channel_id = self._connection.channel_id
        row = AuditRow.build(self._origin, action, channel_id=channel_id, detail=detail)
        self._service.store.audit.note(row)

    def _ids(self) -> dict[str, str | int]:
        return {
            "request_id": self._origin.request_id,
            "user_id": self._connection.user_id,
            "channel_id": self._connection.channel_id,
            "role": self._role,
        }


async def open_stream(service: Service, request: Request) -> EventStream:
    """Everything that can refuse a stream comes before its response begins."""
    assert request.path_id is not None
    claims = await service.authenticate(request, for_stream=True)
    cursor = read_cursor(request)
    permit = await service.permit(request, request.path_id)
    service.gate.require_open(permit)
    return EventStream(service, request, claims, permit, cursor)


def read_cursor(request: Request) -> Cursor | None:
    """Where to resume: the header, which `EventSource` sends by itself, or the query.

    Raises:
        Problem: INVALID_CURSOR.
    """
    raw = request.header(b"last-event-id")
    if raw is None:
        text = request.query("lastEventId")
        raw = None if text is None else text.encode()
    try:
        return None if raw is None else parse_cursor(raw)
    except CursorError:
        raise Problem("INVALID_CURSOR") from None
