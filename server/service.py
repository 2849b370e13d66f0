"""The parts of one worker, put together, and what every handler asks of them."""

import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256

import structlog
import trio

from protocol.closing import ClosingReason
from server.auth.access import Gate, Permit
from server.auth.clerk import Claims, TokenRefused, TokenVerifier
from server.auth.credentials import (
    BadCredential,
    Credential,
    TokenInUrl,
    find_credentials,
    is_foreign_page,
    origin_matches,
)
from server.auth.evictions import Evictions
from server.auth.jwks import KeySource, KeysUnavailable
from server.auth.rechecks import Rechecks
from server.live.catch_up import CatchUp
from server.live.clock import Clock
from server.live.connection import StreamLimits
from server.live.hub import Hub
from server.metrics import READY, TASKS
from server.settings import Settings
from server.web.problems import Problem
from server.web.rate import SendRate
from server.web.request import Request
from storage.audit import AuditRow
from storage.contract import StoreUnavailable, User
from storage.failures import keep_running
from storage.store import Store, StoreConfig, open_store

log = structlog.get_logger("server")


class Service:
    """What a worker holds while it serves. Made by `open_service`."""

    def __init__(self, settings: Settings, keys: KeySource, store: Store, hub: Hub) -> None:
        self.settings = settings
        self.keys = keys
        self.store = store
        self.hub = hub
        self.enabled = settings.chat_enabled
        self.draining = False
        self.done = trio.Event()
        """Set by whoever has it: it is to close."""
        self.opening = trio.Semaphore(MAX_OPENING)
        self.streams = 0
        """Open ones, those included that are saying why they end."""
        self.stream_limits = StreamLimits(
            heartbeat=settings.heartbeat_seconds,
            retry=settings.retry_milliseconds,
            outbox=settings.outbox_bytes,
            stall=settings.stall_seconds,
        )
        self.clock = Clock(tick=min(TICK_SECONDS, settings.heartbeat_seconds / 8))
        self.gate = Gate(store, cache=settings.access_cache_seconds, trials=settings.trials)
        self.send_rate = SendRate(settings.max_sends_per_second)
        self.catch_up = CatchUp(
            hub, store, reconcile=settings.reconcile_seconds, poll=settings.poll_seconds
        )
        self.rechecks = Rechecks(self.gate, hub.all_streams, seconds=settings.recheck_seconds)
        self.evictions = Evictions(self.gate, hub.all_streams, self.rechecks.look)
        store.on_evicted = self.evictions.take
        store.on_missed = self._missed
        store.redis.on_suspect = self.catch_up.look_now
        self._verifier = TokenVerifier(
            keys,
            issuer=settings.issuer,
            authorized_parties=settings.authorized_parties,
        )

    def _missed(self) -> None:
        """Messages and evictions may have passed unheard. Plain."""
        self.catch_up.look_now()
        if self.store.feed.connected:  # else once it is back: until then no word is sure
            self.evictions.missed()

    async def authenticate(self, request: Request, *, for_stream: bool = False) -> Claims:
        """Whose session the request carries.

        Args:
            for_stream: a ticket counts, too.

        Raises:
            Problem: UNAUTHENTICATED, TOKEN_EXPIRED, TOKEN_IN_URL, ORIGIN_REFUSED.
            StoreUnavailable: a ticket could not be looked up.
        """
        try:
            found = find_credentials(
                request.headers,
                request.query_string,
                publishable_key=self.settings.clerk_publishable_key,
                allow_ticket=for_stream,
            )
        except TokenInUrl:
            raise Problem("TOKEN_IN_URL") from None
        except BadCredential:
            raise Problem("UNAUTHENTICATED") from None
        claims, expired_for = None, math.inf
        for credential in found:
            try:
                claims = await self._believe(credential, request)
                break
            except TokenRefused as refused:
                log.info("token_refused", reason=refused.reason, request_id=request.id)
                if refused.expired_for is None:
                    raise Problem("UNAUTHENTICATED") from None
                expired_for = min(expired_for, refused.expired_for)
        if claims is None:
            if expired_for < MAX_EXPIRED_SECONDS:
                raise Problem("TOKEN_EXPIRED", retry_after=RENEWAL_SECONDS)
            raise Problem("UNAUTHENTICATED")
        request.subject, request.impersonator = claims.subject, claims.actor
        if credential.kind == "cookie":
            self._require_our_page(request, for_stream=for_stream)
        return claims

    async def _believe(self, credential: Credential, request: Request) -> Claims:
        """The session that a credential stands for.

        Raises:
            TokenRefused, StoreUnavailable
            Problem: UNAUTHENTICATED, for a ticket.
        """
        if credential.kind == "ticket":
            return await self._redeem(credential.value, request)
        try:
            return await self._verifier.verify(credential.value)
        except KeysUnavailable as unavailable:
            raise StoreUnavailable(unavailable.retry_after) from None

    def _require_our_page(self, request: Request, *, for_stream: bool) -> None:
        """A browser sends a cookie whichever page asks.

        Raises:
            Problem: ORIGIN_REFUSED.
        """
        allowed = self.settings.allowed_origins
        if request.method == "POST":
            refused = not origin_matches(request.headers, allowed_origins=allowed)
        else:
            refused = for_stream and is_foreign_page(request.headers, allowed_origins=allowed)
        if refused:
            raise Problem("ORIGIN_REFUSED", detail=ORIGIN_DETAIL)

    async def caller(self, request: Request) -> User:
        """The active user behind an authenticated request. Raises: see `Gate.active`."""
        assert request.subject is not None
        access = await self.gate.look(request.subject, None)
        request.user_id = access.user.id if access.user else None
        return self.gate.active(access)

    async def permit(self, request: Request, channel_id: int) -> Permit:
        """An authenticated caller's way into a channel. Raises: see `Gate.permit`."""
        assert request.subject is not None
        request.channel_id = channel_id
        access = await self.gate.look(request.subject, channel_id)
        request.user_id = access.user.id if access.user else None
        return self.gate.permit(access)

    def note(
        self, request: Request, action: str, *, outcome: str = "ok", detail: str | None = None
    ) -> None:
        """One row of the audit trail, written soon. Plain."""
        self.store.audit.note(self.audit_row(request, action, outcome=outcome, detail=detail))

    def audit_row(
        self, request: Request, action: str, *, outcome: str = "ok", detail: str | None = None
    ) -> AuditRow:
        origin = request.origin(hops=self.settings.forwarded_hops)
        return AuditRow.build(
            origin, action, channel_id=request.channel_id, outcome=outcome, detail=detail
        )

    def set_enabled(self, enabled: bool) -> None:
        """Turn the chat on or off; off ends every stream. Plain."""
        self.enabled = enabled
        log.info("chat_enabled" if enabled else "chat_disabled", streams=self.hub.streams)
        if not enabled:
            for stream in self.hub.all_streams():
                stream.end(ClosingReason.CHAT_DISABLED)

    @property
    def unready(self) -> list[str]:
        """Why no request could succeed now, a sentence each, free of secrets; empty: it could.

        Redis is not asked about: without it everything works, some of it by a longer way.
        """
        keys = [] if self.keys.known else ["the issuer's keys are not known"]
        return [*keys, *self.store.unready]

    async def serve_counts(self) -> None:
        """Count, until cancelled, what nobody else can: another worker may answer the scrape."""
        while True:
            READY.set(0 if self.unready else 1)
            TASKS.set(trio.lowlevel.current_statistics().tasks_living)
            self.store.count_connections()
            await trio.sleep_until((trio.current_time() // COUNT_SECONDS + 1) * COUNT_SECONDS)

    async def drain(self, in_flight: Callable[[], int], *, refuse: bool, seconds: float) -> None:
        """End every stream, spread over a time. What else is under way goes on.

        Args:
            in_flight: how many requests are being answered, streams included.
            seconds: until the last stream is ended; `FINISH_SECONDS` more until this returns.
            refuse: new streams get 503 from now on. Else they are begun, and ended in their turn:
                then their clients come back, and find another worker.
        """
        self.draining = refuse
        streams = self.hub.all_streams()
        log.info("draining", streams=len(streams), seconds=seconds)
        random.shuffle(streams)  # or the newest would always live longest
        started = trio.current_time()
        for index, stream in enumerate(streams):
            due = started + seconds * index / len(streams)
            if trio.current_time() < due:  # a turn of a busy loop is longer than a stream's share
                await trio.sleep_until(due)
            stream.end(ClosingReason.DRAIN)
        with trio.move_on_after(FINISH_SECONDS):
            # Streams have a last word to say. Where nobody else accepts requests come without an
            # end, and would be waited for until nobody takes them any more.
            while self.streams or (not refuse and in_flight()):
                for stream in self.hub.all_streams():  # begun meanwhile
                    stream.end(ClosingReason.DRAIN)
                await trio.sleep(0.02)
        log.info("drained", seconds=round(trio.current_time() - started, 2), left=in_flight())

    async def _redeem(self, ticket: str, request: Request) -> Claims:
        assert request.path_id is not None  # only a stream takes a ticket
        lease = self.settings.session_lease_seconds * MIN_LEASE_SHARE
        found = await self.store.redeem_ticket(
            ticket_digest(ticket), channel_id=request.path_id, lease=lease
        )
        if found is None:
            raise Problem("UNAUTHENTICATED")
        return Claims(
            subject=found.subject,
            session_id=found.session_id,
            expires_at=found.session_expires_at,
            actor=found.impersonator,
        )


MIN_LEASE_SHARE = 0.9
"""Each stream's lease is shortened at random, to this share of the setting at least, so that those
that came together do not end together. A ticket is good for the shortest one: else a stream whose
lease has ended would come back to be ended at once, again and again."""

MAX_OPENING = 400
"""Streams that read their first page at one time: as many as fill the batches twice. The others
wait before that. In a storm all would wait for the store, and be refused after its time."""

MAX_EXPIRED_SECONDS = 12 * 3600.0
"""How long ago a genuine token may have expired for its client to be told to renew it and come
back. A tab that slept through a night wakes up with such a token and has a new one seconds later.
An older one is most likely left over from somebody who signed out; and whoever kept a stolen one
learns nothing from the answer but that it was genuine."""

RENEWAL_SECONDS = 5.0
"""How long a client is asked to wait for its page to renew the token: Clerk's script asks for one
as soon as the tab wakes up. A page that never renews it asks some 5,000 times in 12 hours, with a
row in the audit trail each; twice as long would double what everybody else waits."""

ORIGIN_DETAIL = (
    "The request's Origin is neither that of the Host header nor an allowed one. Let the proxy keep"
    " Host, or name the page's origin in SOTTOVOCE_ALLOWED_ORIGINS."
)
"""The likeliest cause is a proxy that rewrites Host, before a browser that does not send
`Sec-Fetch-Site`: an old one, or any on plain http."""

TICK_SECONDS = 0.5
"""Of the streams' clock: heartbeats and leases are this exact."""

FINISH_SECONDS = 3.0
"""For requests under way when the last stream has ended; a send takes at most half of it."""

COUNT_SECONDS = 1.0
"""Between two counts of tasks and connections, which take some microseconds."""


def ticket_digest(ticket: str) -> bytes:
    """What is stored of a ticket: who reads the table cannot use it."""
    return sha256(ticket.encode()).digest()


@asynccontextmanager
async def open_service(settings: Settings, keys: KeySource) -> AsyncIterator[Service]:
    """A running service. Neither Redis nor PostgreSQL needs to be there yet, nor the keys."""
    config = StoreConfig(
        conninfo=settings.database_conninfo,
        redis_url=settings.redis_url,
        history_size=settings.history_size,
        history_ttl_seconds=settings.history_ttl_seconds,
        seconds=settings.store_seconds,
        connections=settings.db_connections,
        connection_seconds=settings.db_connection_seconds,
    )
    hub = Hub()
    async with open_store(config, deliver=hub.deliver) as store:
        hub.want, hub.drop = store.feed.want, store.feed.drop
        service = Service(settings, keys, store, hub)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_running, "catch_up", service.catch_up.serve)
            nursery.start_soon(keep_running, "clock", service.clock.run)
            nursery.start_soon(keep_running, "quiet_channels", hub.serve)
            nursery.start_soon(keep_running, "evictions", service.evictions.serve)
            nursery.start_soon(keep_running, "rechecks", service.rechecks.serve)
            nursery.start_soon(keep_running, "counts", service.serve_counts)
            yield service
            nursery.cancel_scope.cancel()
