"""Epochs: what begins one, what a store does in it, and that it believes nothing of another."""

import threading
import time
from typing import Any

import psycopg
import pytest
import redis
import structlog.testing
import trio

from storage.contract import Page, StoreUnavailable
from storage.postgres import epoch as epoch_module
from storage.postgres.connection import Connection
from storage.postgres.epoch import EpochError, begin_epoch
from storage.postgres.queries import QUERIES
from storage.redis import Keys
from storage.store import UNKNOWN, WATCH_SECONDS
from tests.storage.stores import Room, draft, insert_messages, make_rooms, opened_store, stored
from tests.support.services import Database


@pytest.fixture
async def time_limit():
    with trio.fail_after(40):
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs begin without a second's pause: for tests where no two are of one backup."""
    monkeypatch.setattr(epoch_module, "SETTLE_SECONDS", 0)


def epoch_of(database: Database) -> int:
    [(epoch,)] = database.execute("SELECT epoch FROM chat_epoch")
    return int(epoch)


def restore(database: Database, *rooms: Room) -> None:
    """What putting back a backup of the empty channels does to the tables."""
    for room in rooms:
        database.execute("DELETE FROM chat_messages WHERE channel_id = %s", (room.channel_id,))
        database.execute("UPDATE chat_channels SET last_seq = 0 WHERE id = %s", (room.channel_id,))
    database.execute("UPDATE chat_epoch SET epoch = 0")


# Beginning one


def test_the_first_epoch_is_0_and_the_next_ones_are_times(database: Database):
    assert epoch_of(database) == 0
    before = int(time.time())
    first = begin_epoch(database.conninfo)
    assert first.old == 0 and before <= first.new <= time.time()
    second = begin_epoch(database.url)
    assert second.old == first.new < second.new == epoch_of(database)


def test_two_restores_of_one_backup_do_not_give_the_same_epoch(database: Database):
    """However quickly they follow each other."""
    given = []
    for _ in range(3):
        restore(database)
        given.append(begin_epoch(database.conninfo).new)
    assert given == sorted(set(given))


@pytest.mark.usefixtures("at_once")
def test_an_epoch_is_higher_than_the_last_also_where_the_clock_went_back(database: Database):
    ahead = int(time.time()) + 10_000
    database.execute("UPDATE chat_epoch SET epoch = %s", (ahead,))
    assert begin_epoch(database.conninfo) == (ahead, ahead + 1)


def test_there_is_one_epoch_with_at_most_as_many_digits_as_a_cursor_has(database: Database):
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.execute("INSERT INTO chat_epoch VALUES (1)")
    with pytest.raises(psycopg.errors.CheckViolation):
        database.execute("UPDATE chat_epoch SET epoch = 10000000000")


@pytest.mark.usefixtures("at_once")
def test_an_epoch_begins_when_the_sends_under_way_are_committed(database: Database):
    """They have named the old one. Whoever comes later finds the new one."""
    (room,) = make_rooms(database)
    began = threading.Event()

    def begin() -> None:
        begin_epoch(database.conninfo)
        began.set()

    with psycopg.connect(**database.conninfo) as sender:
        sender.execute(QUERIES["append"], ("[]", 0))
        thread = threading.Thread(target=begin)
        thread.start()
        assert not began.wait(0.3)
        sender.execute(
            "INSERT INTO chat_messages (channel_id, seq, message_id, content)"
            " VALUES (%s, 1, gen_random_uuid(), 'x')",
            (room.channel_id,),
        )
        sender.commit()
        thread.join(10)
    assert began.is_set()
    assert stored(database, room.channel_id) == [(1, "x")]


def test_what_keeps_an_epoch_from_beginning_is_said_without_its_values(empty_database: Database):
    with pytest.raises(EpochError, match="sottovoce migrate"):
        begin_epoch(empty_database.conninfo)
    nowhere = {**empty_database.conninfo, "port": 1, "password": "canary"}
    with pytest.raises(EpochError) as caught:
        begin_epoch(nowhere)
    assert "nothing listens on that port" in str(caught.value)
    assert "canary" not in str(caught.value)


# In one


async def texts(store: Any, room: Room, *, head: int = 0) -> list[tuple[bytes, str]]:
    """(id, text) of the newest."""
    page: Page = await store.history(room.channel_id, None, head=head)
    return [(_id_of(record.plain), record.reply().content) for record in page.records]


def _id_of(event: bytes) -> bytes:
    return event.splitlines()[0].removeprefix(b"id: ")


async def until(condition: Any, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.usefixtures("time_limit", "at_once")
async def test_every_way_to_a_message_gives_it_the_same_id(database: Database, redis_url: str):
    """Stored here, heard of from another worker, read from PostgreSQL and from Redis."""
    (room,) = make_rooms(database)
    epoch = begin_epoch(database.conninfo).new
    expected = b"%d.1" % epoch
    async with opened_store(database, redis_url) as one, opened_store(database, redis_url) as two:
        await two.store.access("clerk_tess", room.channel_id)
        two.store.feed.want(room.channel_id)
        assert await two.store.feed.listening(room.channel_id, seconds=5)
        record = await one.store.append(draft(room, "a"))
        assert one.store.epoch == two.store.epoch == epoch
        assert _id_of(record.plain) == _id_of(record.frame().plain) == expected
        await until(lambda: two.delivered)
        assert two.delivered == [(room.channel_id, record)]
        with redis.Redis.from_url(redis_url) as client:
            key = Keys(database.conninfo, epoch=epoch).recent(room.channel_id)
            assert b":%d:{" % epoch in key
            await until(lambda: client.zcard(key) == 1)
        assert await texts(two.store, room, head=1) == [(expected, "a")]
        page = await two.store.missed(room.channel_id, 0, head=1)
        assert [_id_of(each.plain) for each in page.records] == [expected]
        before = await two.store.page_before(room.channel_id, record.reply().id, size=5)
        assert before == []


def test_in_epoch_0_ids_and_keys_are_as_they_always_were():
    conninfo = {"host": "h", "port": 1, "dbname": "d"}
    assert Keys(conninfo).recent(42).count(b":") == 3
    keys = Keys(conninfo, epoch=1795430000)
    assert keys.recent(42).endswith(b":1795430000:{42}:recent")
    assert keys.channel_of(keys.live(42)) == 42
    assert keys.control == Keys(conninfo).control, "the main application's name for it"


@pytest.mark.usefixtures("time_limit", "at_once")
async def test_what_redis_has_of_a_lost_future_is_not_read(database: Database, redis_url: str):
    (room,) = make_rooms(database)
    async with opened_store(database, redis_url) as (store, _):
        for number in range(3):
            await store.append(draft(room, f"lost {number}"))
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(Keys(database.conninfo).recent(room.channel_id)) == 3)
        assert [text for _, text in await texts(store, room, head=3)] == [
            "lost 0",
            "lost 1",
            "lost 2",
        ]
    restore(database, room)
    insert_messages(database, room, 2)
    epoch = begin_epoch(database.conninfo).new
    async with opened_store(database, redis_url) as (store, _):
        await store.access("clerk_tess", room.channel_id)
        for _ in range(2):  # the second time from Redis
            assert await texts(store, room, head=2) == [
                (b"%d.1" % epoch, "text 1"), (b"%d.2" % epoch, "text 2")
            ]  # fmt: skip
            key = Keys(database.conninfo, epoch=epoch).recent(room.channel_id)
            with redis.Redis.from_url(redis_url) as client:
                await until(lambda key=key, client=client: client.zcard(key) == 2)


@pytest.mark.usefixtures("time_limit", "at_once")
async def test_who_believes_in_an_epoch_that_is_over_stores_and_publishes_nothing(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        pubsub.subscribe(Keys(database.conninfo).live(room.channel_id))
        async with opened_store(database, redis_url) as (store, delivered):
            await store.append(draft(room, "before"))
            await until(lambda: client.zcard(Keys(database.conninfo).recent(room.channel_id)) == 1)
            delivered.clear()
            begin_epoch(database.conninfo)
            with pytest.raises(StoreUnavailable):
                await store.append(draft(room, "late"))
            assert store.over.is_set(), "the refusal itself says why"
            assert store.epoch == 0, "another store is to take over: this one does not change"
            with pytest.raises(StoreUnavailable):
                await store.append(draft(room, "later"))
            await trio.sleep(0.1)
            assert delivered == []
        heard = [message["type"] for message in iter(lambda: pubsub.get_message(timeout=0.1), None)]
    assert heard == ["subscribe", "message"]
    assert stored(database, room.channel_id) == [(1, "before")]


@pytest.mark.usefixtures("time_limit", "at_once")
async def test_a_quiet_store_notices_another_epoch_by_itself(database: Database):
    async with opened_store(database) as (store, _):
        await store.access("clerk_tess", None)
        assert store.epoch == 0 and not store.over.is_set()
        begin_epoch(database.conninfo)
        with trio.fail_after(WATCH_SECONDS + 1):
            await store.over.wait()


@pytest.mark.usefixtures("time_limit")
async def test_a_database_that_has_less_than_was_shown_is_told_of(database: Database):
    """Nobody has said `sottovoce restored`; the look for missed messages sees that it is time."""
    rooms = make_rooms(database, 3)
    for room, count in zip(rooms, (5, 5, 5), strict=True):
        insert_messages(database, room, count)
    ids = [room.channel_id for room in rooms]
    async with opened_store(database) as (store, _):
        with structlog.testing.capture_logs() as logs:

            def told() -> list[int]:
                return [line["channels"] for line in logs if line["event"] == "messages_lost"]

            assert await store.heads({ids[0]: 4, ids[1]: 5, ids[2]: 0}) == {ids[0]: 5, ids[2]: 5}
            assert told() == []
            assert await store.heads({ids[0]: 4, ids[1]: 6, ids[2]: 70}) == {ids[0]: 5}
            assert told() == [2]


_OF_THE_TABLES = (QUERIES["catalog"], QUERIES["applied"])


@pytest.mark.usefixtures("time_limit")
async def test_postgresql_is_asked_nothing_before_its_epoch(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    """Else what Redis has could be believed in the wrong one."""
    fetch = Connection.fetch
    asked: list[bytes] = []

    async def note(connection: Any, query: bytes, params: Any, *, deadline: float) -> Any:
        if query in QUERIES.values():
            asked.append(query)
        return await fetch(connection, query, params, deadline=deadline)

    (room,) = make_rooms(database)
    monkeypatch.setattr(Connection, "fetch", note)
    for first in ("access", "append"):
        asked.clear()
        async with opened_store(database) as (store, _):
            assert store.epoch == UNKNOWN
            if first == "access":
                await store.access("clerk_tess", room.channel_id)
            else:
                assert (await store.append(draft(room, "a"))).seq == 1
            # What is asked before says nothing of a message: whether the tables are there.
            numbered = [each for each in asked if each not in _OF_THE_TABLES]
            assert numbered[0] == QUERIES["ping"]
            assert QUERIES[first] in numbered
            assert store.epoch == 0
