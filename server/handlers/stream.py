"""`GET /api/chat/<channelId>`: a channel's messages as they come, as Server-Sent Events."""

import random
import time

import structlog
import trio

from protocol.closing import ClosingReason
from protocol.cursors import MAX_SEQ, CursorError, parse_cursor
from server.auth.access import Permit
from server.auth.clerk import Claims
from server.live.connection import Connection, EndedEarly, Lease, StreamLimits
from server.metrics import STREAM_SECONDS, STREAMS_OPEN
from server.service import Service
from server.web.problems import Problem
from server.web.request import Request
from server.web.response import COMMON, Headers, Send
from storage.contract import ChannelGone

log = structlog.get_logger("live")

EARLY_ENDS = {
    ClosingReason.DRAIN: "DRAINING",
    ClosingReason.CHAT_DISABLED: "NOT_FOUND",
}
"""What a stream gets that is ended before its response has begun."""


class EventStream:
    """The response: runs for as long as the stream lives."""

    def __init__(
        self, service: Service, request: Request, claims: Claims, permit: Permit, after: int | None
    ) -> None:
        self._service = service
        self._request = request
        self._claims = claims
        self._permit = permit
        self._after = after

    async def __call__(self, send: Send, extra: Headers = ()) -> None:
        service, request = self._service, self._request
        settings, channel_id = service.settings, self._permit.channel.channel_id
        subject = self._claims.subject

        async def check() -> ClosingReason | None:
            return await service.gate.why_end(subject, channel_id)

        opened = False

        async def start(send: Send) -> None:
            nonlocal opened
            opened = True
            headers = [
                (b"content-type", b"text/event-stream"),
                (b"x-accel-buffering", b"no"),
                *COMMON,
                *extra,
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            service.note(request, "stream_opened")
            log.info("stream_opened", **ids)

        now = trio.current_time()
        lease = settings.session_lease_seconds * random.uniform(0.9, 1.0)
        connection = Connection(
            id=request.id,
            channel_id=channel_id,
            user_id=self._permit.user.id,
            hub=service.hub,
            store=service.store,
            limits=StreamLimits(
                heartbeat=settings.heartbeat_seconds,
                retry=settings.retry_milliseconds,
                outbox=settings.outbox_bytes,
                stall=settings.stall_seconds,
                recheck=settings.recheck_seconds,
            ),
            lease=Lease(
                session_ends=now + self._claims.expires_at - time.time() + lease,
                max_age_ends=now + settings.max_age_seconds * random.uniform(0.9, 1.0),
                check=check,
            ),
        )
        ids = {
            "request_id": request.id,
            "user_id": self._permit.user.id,
            "channel_id": channel_id,
            "role": self._permit.role,
        }
        self._require_room()
        STREAMS_OPEN.inc()
        try:
            await connection.run(
                cursor=self._after,
                head=self._permit.channel.head,
                start=start,
                send=send,
                receive=request.receive,
            )
        except EndedEarly as ended:
            raise Problem(EARLY_ENDS.get(ended.reason, "UNAVAILABLE"), retry_after=1) from None
        except ChannelGone:
            raise Problem("NOT_YOUR_CHANNEL") from None
        finally:
            STREAMS_OPEN.dec()
            if opened:
                reason = connection.reason.value if connection.reason else "peer_left"
                lived = trio.current_time() - now
                STREAM_SECONDS.labels(reason).observe(lived)
                service.note(request, "stream_closed", detail=reason)
                log.info("stream_closed", reason=reason, seconds=round(lived, 3), **ids)

    def _require_room(self) -> None:
        service, settings = self._service, self._service.settings
        if service.draining:
            raise Problem("DRAINING", retry_after=1)
        if service.hub.streams >= settings.max_streams:
            raise Problem("SERVER_FULL", retry_after=5)
        if service.hub.streams_of(self._permit.user.id) >= settings.max_streams_per_user:
            raise Problem("TOO_MANY_STREAMS", limit=settings.max_streams_per_user, retry_after=30)


async def open_stream(service: Service, request: Request) -> EventStream:
    """Everything that can refuse a stream comes before its response begins."""
    assert request.path_id is not None
    claims = await service.authenticate(request, allow_ticket=True)
    after = read_cursor(request)
    permit = await service.permit(request, request.path_id)
    return EventStream(service, request, claims, permit, after)


def read_cursor(request: Request) -> int | None:
    """Where to resume: the header, which `EventSource` sends by itself, or the query.

    Raises:
        Problem: INVALID_CURSOR.
    """
    raw = request.header(b"last-event-id")
    if raw is None:
        text = request.query("lastEventId")
        raw = None if text is None else text.encode()
    try:
        cursor = None if raw is None else parse_cursor(raw)
    except CursorError:
        raise Problem("INVALID_CURSOR") from None
    if cursor is None:
        return None
    # A cursor of another epoch is of no past that we know: ahead of everything, so a reset.
    return cursor.seq if cursor.epoch == 0 else MAX_SEQ
