"""The store as the server sees it: Redis first, PostgreSQL behind it. See `contract` for what it
promises."""

import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
import trio
from redis.exceptions import RedisError

from protocol import replies
from protocol.confidential import Confidential, Secret
from storage.audit import AuditTrail
from storage.batching import Batcher, Busy
from storage.breaker import Breaker, Event, State
from storage.bridge import Bridge, open_bridge
from storage.contract import (
    Access,
    ChannelAccess,
    ChannelClosed,
    ChannelGone,
    ClientMessageIdReused,
    Draft,
    Eviction,
    Page,
    Record,
    StoreUnavailable,
    User,
)
from storage.failures import keep_running
from storage.history import prove
from storage.metrics import (
    DEPENDENCY_SINCE,
    DEPENDENCY_UP,
    HISTORY_READS,
    POSTGRES_CONNECTIONS,
    REDIS_WRITES_DROPPED,
)
from storage.postgres.catalog import decode_catalog
from storage.postgres.connection import Row
from storage.postgres.migrate import migrations
from storage.postgres.pool import Pool, StatementFailed
from storage.postgres.requirements import unmet_by_server
from storage.redis import Keys
from storage.redis.client import open_client
from storage.redis.cluster import Cluster, ClusterFeed, ClusterMessages
from storage.redis.feed import DENIED_SECONDS, Feed
from storage.redis.recent import RecentMessages, Write
from storage.redis.url import close_async, is_cluster

log = structlog.get_logger("storage")

PROBE_SECONDS = 0.5
"""Between looks at a dependency that is down, jittered by half."""
WATCH_SECONDS = 2.0
"""Between looks at one that is up, so that /readyz knows without traffic."""
REDIS_SECONDS = 0.5
"""For one script: a healthy one takes a millisecond; a hung Redis costs a reader this once."""
REDIS_CLOSE_SECONDS = 1.0
REDIS_WRITES_GATHER_SECONDS = 0.003
"""Between two trips, in which the next writes gather: a trip costs as much as a dozen writes, and
the streams of this process have their messages already."""
REDIS_WRITE_BATCH = 100
"""Channels in one script of writes: nobody else is served meanwhile, a few milliseconds."""
MAX_REDIS_WRITES = 10_000
"""Messages that wait for Redis; further ones go without it."""
PAGE_SIZE = 200
"""Messages in one page of a long catch-up."""
MAX_CHANNELS = 500
"""In a list of channels."""
HEADS_BATCH = 2000
"""Channels in one look for missed messages."""
PAGES_ROWS = 2000
"""In one statement of pages, as far as is known before. As many full pages are as fast in batches
of 2,000 rows as of 20,000, which hold the event loop for up to 93 ms while they are decoded."""
PAGE_ROWS_AT_LEAST = 20
"""That a page counts for: an empty one is work, too."""
REQUIREMENTS_SECONDS = 15.0
"""How often a worker checks that the database has what it needs. The check takes some three
milliseconds of PostgreSQL; a statement that PostgreSQL refuses has it made at once."""
UNMET_SECONDS = 2.0
"""How often it checks while something is missing, so that a repair is noticed soon."""
UNKNOWN = -1
"""The epoch of a store that has heard nothing of PostgreSQL: that of no message and no cursor."""


class StoreConfig(NamedTuple):
    """What the store needs of the settings."""

    conninfo: Mapping[str, Any]
    redis_url: Secret
    history_size: int
    history_ttl_seconds: int
    seconds: float
    """For one request's storage work."""
    connections: int
    connection_seconds: float = 300.0
    """After which a connection to PostgreSQL is replaced."""


class Ticket(Confidential, frozen=True, kw_only=True):
    """The session that a ticket stands for."""

    subject: str
    session_id: str | None
    impersonator: str | None
    session_expires_at: float
    """Seconds since the epoch."""


class ExportHeader(Confidential, frozen=True):
    therapist_name: str
    therapist_email: str
    client_first_name: str
    client_last_name: str
    client_email: str
    messages: int


class _AppendItem(Confidential, frozen=True, kw_only=True):
    ord: int
    channel_id: int
    message_id: str
    client_message_id: str | None
    sender_id: int
    by_therapist: bool
    author_email: str
    author_name: str
    first_name: str
    last_name: str
    content: str
    message_type: str
    actor: str | None
    impersonator: str | None
    address: str | None
    request_id: str


class _PageKey(NamedTuple):
    channel_id: int
    after: int | None
    size: int
    newest: int
    """Messages, where there is no cursor or it is ahead of the channel."""
    head: int
    """That the channel is known to have reached."""

    def rows(self) -> int:
        """About so many."""
        after = 0 if self.after is None else self.after
        return max(PAGE_ROWS_AT_LEAST, min(self.size, self.head - after))


class _AccessKey(Confidential, frozen=True):
    clerk_id: str
    channel_id: int | None


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class Store:
    """See `contract`. Made by `open_store`."""

    def __init__(
        self,
        bridge: Bridge,
        config: StoreConfig,
        *,
        connecting: trio.Nursery,
        deliver: Callable[[Sequence[tuple[int, Record]]], None],
    ) -> None:
        self._config = config
        self._deliver = deliver
        self.on_missed: Callable[[], None] = lambda: None
        """Called when messages or evictions may have passed unheard: the feed was lost, and when
        it is back (`feed.connected`)."""
        self.on_evicted: Callable[[Sequence[Eviction]], None] = lambda _: None
        """Called with the evictions that came together. Plain."""
        self.postgres = Breaker("postgres", tolerance=3, on_change=self._changed)
        self.redis = Breaker("redis", tolerance=2, on_change=self._changed)
        for breaker in (self.postgres, self.redis):
            DEPENDENCY_UP.labels(breaker.name).set(1)
            DEPENDENCY_SINCE.labels(breaker.name).set(breaker.since)
        self._pool = Pool(
            config.conninfo,
            breaker=self.postgres,
            size=config.connections,
            age=config.connection_seconds,
            seconds=config.seconds,
            nursery=connecting,
            on_epoch=self._in_epoch,
        )
        self.epoch = UNKNOWN
        """Which past the numbers belong to, from PostgreSQL's first answer on; never another."""
        self.over = trio.Event()
        """Set when another epoch has begun: this store is to be closed, for another one."""
        self.unmet: tuple[str, ...] | None = None
        """Why no request could succeed in this database, a sentence each, free of secrets; empty
        where one would. None until PostgreSQL was asked for the first time."""
        self._migrations = {migration.number for migration in migrations()}
        self._requirements_due = trio.Event()
        self._pool.on_refused = lambda: self._requirements_due.set()
        self._bridge = bridge
        self._keys = keys = Keys(config.conninfo)
        limits: dict[str, Any] = {
            "size": config.history_size,
            "ttl": config.history_ttl_seconds,
            "seconds": REDIS_SECONDS,
        }
        listeners: dict[str, Any] = {
            "on_records": deliver,
            "on_evicted": lambda evictions: self.on_evicted(evictions),
            "on_missed": lambda: self.on_missed(),
        }
        self._recent: RecentMessages | ClusterMessages
        self.feed: Feed | ClusterFeed
        if is_cluster(config.redis_url):
            cluster = Cluster(bridge, config.redis_url, keys, breaker=self.redis)
            self._recent = ClusterMessages(cluster, keys, **limits)
            self.feed = ClusterFeed(cluster, keys, **listeners)
            self._close_redis = cluster.aclose
        else:
            client = open_client(config.redis_url)
            feed = Feed(bridge, client, keys, breaker=self.redis, **listeners)
            self._recent = RecentMessages(
                bridge, client, keys, breaker=self.redis, hears=feed.hears, **limits
            )
            self.feed = feed
            self._close_redis = partial(close_async, client)
        self.audit = AuditTrail(self._pool)
        self._writes: list[Write] = []
        self._writes_waiting = trio.Event()
        self._appends: Batcher[Draft, Record] = Batcher(
            "append",
            self._append_batch,
            key=lambda draft: draft.channel_id,
            lanes=2,
            room=200,
            max_waiting=5000,
        )
        self._accesses: Batcher[_AccessKey, Access] = Batcher(
            "access",
            self._access_batch,
            key=lambda item: item,
            lanes=1,  # look-ups of one cost: more at once would be smaller batches
            room=500,
            max_waiting=20_000,
        )
        self._pages: Batcher[_PageKey, Page] = Batcher(
            "pages",
            self._page_batch,
            key=lambda item: item,
            lanes=2,
            room=PAGES_ROWS,
            weigh=_PageKey.rows,
            max_waiting=20_000,
        )
        self._gaps: Batcher[_PageKey, Page] = Batcher(
            "gaps",
            self._page_batch,
            key=lambda item: item,
            lanes=1,  # of its own: live messages wait for these, and not behind who comes anew
            room=PAGES_ROWS,
            weigh=_PageKey.rows,
            max_waiting=20_000,
        )
        self._recents: Batcher[int, list[Record]] = Batcher(
            "recent",
            self._recent_batch,
            key=lambda channel_id: channel_id,
            lanes=1,
            room=100,
            max_waiting=20_000,
        )

    # Messages

    async def append(self, draft: Draft, *, seconds: float | None = None) -> Record:
        """Store a message, deliver it to this process's streams, and tell Redis.

        Args:
            seconds: for it, if less than for every request.

        Raises:
            StoreUnavailable: see `contract`.
            ClientMessageIdReused, ChannelGone, ChannelClosed
        """
        return await self._appends.submit(draft, seconds=seconds or self._config.seconds)

    async def history(
        self, channel_id: int, after: int | None, *, head: int, size: int | None = None
    ) -> Page:
        """The messages after a cursor, a page of them; or the newest.

        Args:
            after: a sequence number, or None for the newest `size`.
            head: a number that the channel is known to have reached.
            size: messages at most, where there is no cursor; the history's size unless told.

        Raises:
            StoreUnavailable
            ChannelGone
        """
        newest = size or self._config.history_size
        if self._recent.serves(channel_id):
            try:
                records = await self._recents.submit(channel_id, seconds=REDIS_SECONDS)
                if page := prove(records, after=after, head=head, size=newest):
                    HISTORY_READS.labels("redis").inc()
                    return page
            except StoreUnavailable:
                pass
        size = newest if after is None else PAGE_SIZE
        return await self._read(self._pages, _PageKey(channel_id, after, size, newest, head))

    async def missed(self, channel_id: int, after: int, *, head: int) -> Page:
        """The messages after one that this process has delivered, a page of them: from PostgreSQL
        at once, for what Redis did not pass on it may not have, and if it hangs that is why.

        Args:
            head: as of `history`.

        Raises:
            StoreUnavailable
            ChannelGone
        """
        newest = self._config.history_size
        return await self._read(self._gaps, _PageKey(channel_id, after, PAGE_SIZE, newest, head))

    async def _read(self, pages: Batcher[_PageKey, Page], key: _PageKey) -> Page:
        page = await pages.submit(key, seconds=self._config.seconds)
        HISTORY_READS.labels("postgres").inc()
        if page.records and page.records[-1].seq == page.head:
            newest = page.records[-self._config.history_size :]
            self._write_later((key.channel_id, newest, False))
        return page

    async def page_before(
        self, channel_id: int, message: int | uuid.UUID, *, size: int
    ) -> list[Record] | None:
        """The `size` messages before one, oldest first; None if the channel has no such message.

        Raises:
            StoreUnavailable
        """
        by_id = isinstance(message, int)
        found = await self._pool.fetch(
            "seq_of_message",
            {
                "channel_id": channel_id,
                "id": message if by_id else None,
                "message_id": None if by_id else str(message),
            },
        )
        if not found:
            return None
        rows = await self._pool.fetch(
            "page_before", {"channel_id": channel_id, "before": found[0][0], "size": size}
        )
        return [_record(self.epoch, channel_id, row) for row in reversed(rows)]

    async def heads(self, known: Mapping[int, int]) -> dict[int, int]:
        """Of the channels in `known` (id → number delivered), those that have more. That some have
        fewer is logged: it takes a person to say that the database was restored.

        Raises:
            StoreUnavailable
        """
        ahead: dict[int, int] = {}
        lost = 0
        items = list(known.items())
        for start in range(0, len(items), HEADS_BATCH):
            batch = dict(items[start : start + HEADS_BATCH])
            rows = await self._pool.fetch("heads", (_json(batch),))
            ahead.update((row[0], row[1]) for row in rows if row[1] > batch[row[0]])
            lost += sum(row[1] < batch[row[0]] for row in rows)
        if lost:
            log.error("messages_lost", channels=lost, epoch=self.epoch)
        return ahead

    # People and channels

    async def access(self, clerk_id: str, channel_id: int | None) -> Access:
        """Who a Clerk user is, and what a channel is to them.

        Raises:
            StoreUnavailable
        """
        key = _AccessKey(clerk_id, channel_id)
        return await self._accesses.submit(key, seconds=self._config.seconds)

    async def accesses(self, asked_for: Sequence[tuple[str, int]]) -> list[Access]:
        """`access` of many at once, (Clerk user, channel) each, in one statement of their own.

        Raises:
            StoreUnavailable
        """
        return await self._access_batch([_AccessKey(*key) for key in asked_for])

    async def channels_of(self, user_id: int, *, as_prospect: bool) -> list[replies.Channel]:
        """The channels of a user as therapist and, if so told, as prospect; latest first.

        Raises:
            StoreUnavailable
        """
        rows = await self._pool.fetch(
            "channels_of", {"user_id": user_id, "as_prospect": as_prospect, "limit": MAX_CHANNELS}
        )
        return [_channel(row) for row in rows]

    async def pair(self, therapist_id: int, prospect_user_id: int) -> tuple[int, bool] | None:
        """(the therapist's user id, whether both may have a channel), if both exist."""
        rows = await self._pool.fetch(
            "pair", {"therapist_id": therapist_id, "prospect_user_id": prospect_user_id}
        )
        return (rows[0][0], rows[0][1]) if rows else None

    async def create_channel(
        self, therapist_id: int, prospect_user_id: int, name: str | None, *, for_user: int
    ) -> tuple[replies.Channel, bool]:
        """The pair's channel as `for_user` sees it, and whether it was made now.

        Raises:
            StoreUnavailable
        """
        for _ in range(2):  # whoever loses a race sees the winner's row the second time
            rows = await self._pool.fetch(
                "create_channel",
                {
                    "identifier": f"chat-{uuid.uuid4()}",
                    "therapist_id": therapist_id,
                    "prospect_user_id": prospect_user_id,
                    "name": name,
                },
            )
            if rows:
                channel_id, made = rows[0]
                found = await self._pool.fetch(
                    "channel", {"channel_id": channel_id, "user_id": for_user}
                )
                if found:
                    return _channel(found[0]), made
        raise StoreUnavailable

    async def mark_read(self, channel_id: int, *, as_therapist: bool) -> None:
        """Raises:
        StoreUnavailable
        """
        await self._pool.fetch(
            "mark_read", {"channel_id": channel_id, "as_therapist": as_therapist}
        )

    async def export_header(self, channel_id: int) -> ExportHeader | None:
        """Raises:
        StoreUnavailable
        """
        rows = await self._pool.fetch("export_header", {"channel_id": channel_id})
        return ExportHeader(*rows[0]) if rows else None

    # Tickets

    async def issue_ticket(self, digest: bytes, ticket: Ticket, *, seconds: int) -> None:
        """Keep a ticket's digest. It must be used for the first time within `seconds`.

        Raises:
            StoreUnavailable
        """
        params = {"digest": digest, "seconds": seconds, **msgspec.structs.asdict(ticket)}
        await self._pool.fetch("issue_ticket", params)

    async def redeem_ticket(self, digest: bytes, *, channel_id: int, lease: float) -> Ticket | None:
        """What the ticket stands for; None for an unknown or old one, and for one that was used for
        another channel.

        Args:
            channel_id: what it is used for. Its first use binds it to that channel.
            lease: seconds that it outlives its session's token by, once it has been used.

        Raises:
            StoreUnavailable
        """
        params = {"digest": digest, "channel_id": channel_id, "lease": lease}
        rows = await self._pool.fetch("redeem_ticket", params)
        if not rows:
            return None
        subject, session_id, impersonator, session_expires_at = rows[0]
        return Ticket(
            subject=subject,
            session_id=session_id,
            impersonator=impersonator,
            session_expires_at=session_expires_at,
        )

    # Batches

    async def _append_batch(self, drafts: list[Draft]) -> list[Record | Exception]:
        items = [
            _AppendItem(
                ord=index,
                channel_id=draft.channel_id,
                message_id=draft.message_id,
                client_message_id=draft.client_message_id,
                sender_id=draft.sender.id,
                by_therapist=draft.by_therapist,
                author_email=draft.sender.email,
                author_name=draft.sender.full_name,
                first_name=draft.sender.first_name,
                last_name=draft.sender.last_name,
                content=draft.content,
                message_type=draft.message_type,
                actor=draft.origin.actor,
                impersonator=draft.origin.impersonator,
                address=draft.origin.address,
                request_id=draft.origin.request_id,
            )
            for index, draft in enumerate(drafts)
        ]
        await self._pool.ask_epoch()
        rows = await self._pool.fetch("append", (_json(items), self.epoch))
        if not rows:  # another epoch has begun, and nothing was stored
            await self._pool.probe()
            raise StoreUnavailable
        results = [
            _appended(self.epoch, draft, row) for draft, row in zip(drafts, rows, strict=True)
        ]
        # A duplicate is delivered too: if the first try's outcome was lost, so was its delivery.
        stored = [
            (draft.channel_id, result)
            for draft, result in zip(drafts, results, strict=True)
            if isinstance(result, Record)
        ]
        if stored:
            self._deliver(stored)
            for channel_id, record in stored:
                self._write_later((channel_id, [record], True))
        return results

    async def _access_batch(self, keys: list[_AccessKey]) -> list[Access]:
        items = [
            {"ord": index, "clerk_id": key.clerk_id, "channel_id": key.channel_id}
            for index, key in enumerate(keys)
        ]
        rows = await self._pool.fetch("access", (_json(items),))
        found = {row[0]: _access(keys[row[0]].clerk_id, row) for row in rows}
        return [found[index] for index in range(len(keys))]

    async def _page_batch(self, keys: list[_PageKey]) -> list[Page | Exception]:
        items = [
            {
                "ord": index,
                "channel_id": key.channel_id,
                "after": key.after,
                "size": key.size,
                "newest": key.newest,
            }
            for index, key in enumerate(keys)
        ]
        rows = await self._pool.fetch("pages", (_json(items),))
        pages: list[Page | Exception] = [ChannelGone() for _ in keys]
        for index, head, reset, *row in rows:
            page = pages[index]
            if not isinstance(page, Page):
                page = pages[index] = Page([], head, reset)
            if row[0] is not None:
                page.records.append(_record(self.epoch, keys[index].channel_id, row))
        return pages

    async def _recent_batch(self, channel_ids: list[int]) -> list[list[Record] | Exception]:
        unique = list(dict.fromkeys(channel_ids))
        found = dict(zip(unique, await self._recent.read(unique), strict=True))
        return [found[channel_id] for channel_id in channel_ids]

    # Redis, after the fact

    def _write_later(self, write: Write) -> None:
        if not self._recent.serves(write[0]) or len(self._writes) >= MAX_REDIS_WRITES:
            REDIS_WRITES_DROPPED.inc(len(write[1]))
            return
        self._writes.append(write)
        self._writes_waiting.set()

    async def _serve_writes(self) -> None:
        while True:
            await self._writes_waiting.wait()
            self._writes_waiting = trio.Event()
            while self._writes:
                batch = self._writes[:REDIS_WRITE_BATCH]
                del self._writes[:REDIS_WRITE_BATCH]
                try:
                    await self._recent.write(batch)
                except StoreUnavailable:
                    REDIS_WRITES_DROPPED.inc(sum(len(records) for _, records, _ in batch))
                await trio.sleep(REDIS_WRITES_GATHER_SECONDS)

    # Dependencies

    def _in_epoch(self, epoch: int) -> None:
        """PostgreSQL has said which one it is in. Plain."""
        if self.epoch == UNKNOWN:
            self.epoch = epoch
            self._keys.enter(epoch)
            log.info("epoch_known", epoch=epoch)
        elif epoch != self.epoch and not self.over.is_set():
            log.warning("epoch_over", epoch=self.epoch, next_epoch=epoch)
            self.over.set()

    @property
    def unready(self) -> tuple[str, ...]:
        """Why no request could succeed now, a sentence each, free of secrets; empty: it could."""
        if self.postgres.up and self.unmet is not None:
            return self.unmet
        if (why := self._pool.unreachable) is not None:
            return (str(why),)
        return ("the database does not answer",)

    async def check_requirements(self) -> None:
        """Find out whether a request would succeed in this database, and keep it in `unmet`.

        The catalog names what is missing; then the statements of a request are run with nothing
        to do, which PostgreSQL refuses as it would refuse the real one.

        Raises:
            StoreUnavailable: PostgreSQL does not answer; what was known stays.
        """
        try:
            rows = await self._pool.fetch("catalog", in_any_epoch=True)
            catalog = decode_catalog(rows[0][0])
            rows = await self._pool.fetch("applied", in_any_epoch=True)
            applied = {row[0] for row in rows}
            found = unmet_by_server(catalog, applied=applied, known=self._migrations)
        except StatementFailed as failed:
            reason = "the database is not migrated, or this role may not read chat_migrations"
            found = [f"{reason}: run sottovoce migrate (SQLSTATE {failed.sqlstate})"]
        if not found:
            await self._pool.probe()
            if self.epoch == UNKNOWN:
                if not self.postgres.up:
                    raise StoreUnavailable
                found = ["chat_epoch has no row, or may not be read: run sottovoce migrate"]
        if not found:
            for name, params in (
                ("access", ('[{"ord": 0, "clerk_id": "", "channel_id": 0}]',)),
                ("pages", ('[{"ord": 0, "channel_id": 0, "size": 1, "newest": 1}]',)),
                ("append", ("[]", self.epoch)),
            ):
                try:
                    await self._pool.fetch(name, params)
                except StatementFailed as failed:
                    found.append(
                        f"statement {name} is refused (SQLSTATE {failed.sqlstate}): run sottovoce "
                        "migrate, or see the database's log"
                    )
        unmet = tuple(found)
        if unmet != self.unmet:
            if unmet:
                log.error("requirements_unmet", findings=list(unmet))
            elif self.unmet:
                log.info("requirements_met")
            self.unmet = unmet

    async def _serve_requirements(self) -> None:
        while True:
            with suppress(StoreUnavailable):
                await self.check_requirements()
            self._requirements_due = trio.Event()
            pause = UNMET_SECONDS if self.unmet != () else REQUIREMENTS_SECONDS
            with trio.move_on_after(pause * random.uniform(0.8, 1.0)):
                await self._requirements_due.wait()
                await trio.sleep(PROBE_SECONDS)  # whatever is refused, at most this often

    def count_connections(self) -> None:
        """Say in the metrics how many there are. Plain."""
        POSTGRES_CONNECTIONS.set(self._pool.connections)

    def _changed(self, breaker: Breaker) -> None:
        DEPENDENCY_UP.labels(breaker.name).set(1 if breaker.up else 0)
        DEPENDENCY_SINCE.labels(breaker.name).set(breaker.since)
        if breaker.up:
            self._requirements_due.set()  # who comes back may not be who went
            log.info("dependency_recovered", dependency=breaker.name)
        else:
            log.warning("dependency_down", dependency=breaker.name)

    async def _probe(self, breaker: Breaker, probe: Callable[[], Awaitable[bool]]) -> None:
        """Bring a dependency back, and notice its loss also when nobody asks for it."""
        while True:
            with trio.move_on_after(WATCH_SECONDS * random.uniform(0.8, 1.0)):
                await breaker.opened.wait()
            if not breaker.up:
                seconds = DENIED_SECONDS if breaker.denied else PROBE_SECONDS
                await trio.sleep(seconds * random.uniform(0.5, 1.0))
                breaker.record(Event.PROBING)
            if not await probe() and breaker.state is State.HALF_OPEN:
                breaker.record(Event.FAILED)

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for batcher in (
                self._appends,
                self._accesses,
                self._pages,
                self._gaps,
                self._recents,
            ):
                await nursery.start(batcher.serve)
            nursery.start_soon(keep_running, "redis_writes", self._serve_writes)
            nursery.start_soon(keep_running, "feed", self.feed.serve)
            nursery.start_soon(keep_running, "audit", self.audit.serve)
            nursery.start_soon(keep_running, "requirements", self._serve_requirements)
            nursery.start_soon(self._probe, self.postgres, self._pool.probe)
            nursery.start_soon(self._probe, self.redis, self._recent.probe)
            task_status.started()

    async def _close(self) -> None:
        self._pool.close()
        with trio.move_on_after(REDIS_CLOSE_SECONDS, shield=True), suppress(RedisError, OSError):
            await self._bridge.run(self._close_redis)


@asynccontextmanager
async def open_store(
    config: StoreConfig, *, deliver: Callable[[Sequence[tuple[int, Record]]], None]
) -> AsyncIterator[Store]:
    """A running store. Neither dependency needs to be there yet.

    Args:
        deliver: called with (channel id, record) for each message that this process stored or
            heard of, in whatever order and however often. Plain.
    """
    async with open_bridge() as bridge, trio.open_nursery() as connecting:
        store = Store(bridge, config, connecting=connecting, deliver=deliver)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(store._serve)
                yield store
                nursery.cancel_scope.cancel()
        finally:
            await store._close()


def _access(clerk_id: str, row: Row) -> Access:
    (_, user_id, email, first, last, is_active, subscription, sponsored, therapist_id) = row[:9]
    if user_id is None:
        return Access(None, None)
    user = User(
        id=user_id,
        clerk_id=clerk_id,
        email=email,
        first_name=first,
        last_name=last,
        is_active=is_active,
        subscription_status=subscription,
        sponsored=sponsored,
        therapist_id=therapist_id,
    )
    return Access(user, None if row[9] is None else ChannelAccess(*row[9:]))


def _appended(epoch: int, draft: Draft, row: Row) -> Record | Exception:
    _, outcome, seq, message_row_id, message_id, ts, email, name, first_name, last_name = row
    match outcome:
        case "busy":
            return Busy()
        case "gone":
            return ChannelGone()
        case "conflict":
            return ClientMessageIdReused()
        case "blocked" | "archived":
            return ChannelClosed(outcome)
    return Record.build(
        epoch=epoch,
        channel_id=draft.channel_id,
        seq=seq,
        ts=ts,
        id=message_row_id,
        message_id=message_id,
        client_message_id=draft.client_message_id,
        sender_id=draft.sender.id,
        content=draft.content,
        author=name,
        author_email=email,
        message_type=draft.message_type,
        status="SENT",
        first_name=first_name,
        last_name=last_name,
    )


def _record(epoch: int, channel_id: int, row: Sequence[Any]) -> Record:
    (seq, row_id, message_id, sender_id, client_message_id, content) = row[:6]
    email, name, first_name, last_name, message_type, status, ts = row[6:]
    return Record.build(
        epoch=epoch,
        channel_id=channel_id,
        seq=seq,
        ts=ts,
        id=row_id,
        message_id=message_id,
        client_message_id=client_message_id,
        sender_id=sender_id,
        content=content,
        author=name,
        author_email=email,
        message_type=message_type,
        status=status,
        first_name=first_name,
        last_name=last_name,
    )


def _channel(row: Row) -> replies.Channel:
    return replies.Channel(
        id=row[0],
        channel_identifier=row[1],
        therapist_id=row[2],
        prospect_user_id=row[3],
        status=row[4],
        last_message_at=None if row[5] is None else replies.timestamp(row[5]),
        last_message_preview=row[6],
        unread_count=row[7],
        therapist_name=row[8],
        therapist_title=row[9],
        prospect_first_name=row[10],
        prospect_last_name=row[11],
        prospect_email=row[12],
        channel_name=row[13],
    )
