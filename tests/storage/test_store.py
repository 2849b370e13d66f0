"""What the store promises, against a real PostgreSQL and a real Valkey."""

import time
import uuid
from typing import Any

import msgspec
import pytest
import redis
import trio
import trio.testing

from storage.contract import (
    ChannelAccess,
    ChannelGone,
    ClientMessageIdReused,
    Page,
    Record,
    StoreUnavailable,
)
from storage.metrics import HISTORY_READS
from storage.postgres.migrate import migrate
from storage.postgres.pool import StatementFailed
from storage.redis import Keys
from storage.store import Store, Ticket
from tests.storage.stores import (
    Room,
    draft,
    insert_messages,
    make_rooms,
    opened_store,
    stored,
)
from tests.support.services import Database

pytestmark = pytest.mark.usefixtures("time_limit")


@pytest.fixture
async def time_limit():
    with trio.fail_after(40):
        yield


async def gather(*calls: Any) -> list[Any]:
    """Call all at once; results or exceptions in the order of the calls."""
    results: list[Any] = [None] * len(calls)

    async def one(index: int, call: Any) -> None:
        try:
            results[index] = await call()
        except Exception as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(one, index, call)
    return results


def seqs(page: Page | list[Record]) -> list[int]:
    return [record.seq for record in (page.records if isinstance(page, Page) else page)]


async def until(condition: Any, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)


class Sources:
    """Where pages came from since this was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        return {name: HISTORY_READS.labels(name)._value.get() for name in ("redis", "postgres")}

    def __call__(self) -> dict[str, float]:
        now = self._now()
        changed = {name: now[name] - self._before[name] for name in now}
        self._before = now
        return {name: count for name, count in changed.items() if count}


# Appends


async def test_two_hundred_concurrent_appends_by_two_workers_are_numbered_without_holes(
    database: Database, redis_url: str
):
    rooms = make_rooms(database, 10)
    async with opened_store(database, redis_url) as one, opened_store(database, redis_url) as two:
        records: list[Record] = await gather(
            *(
                lambda n=n: (one, two)[n % 2].store.append(draft(rooms[n // 2 % 10], f"text {n}"))
                for n in range(200)
            )
        )
    for number, room in enumerate(rooms):
        mine = [(r.seq, f"text {n}") for n, r in enumerate(records) if n // 2 % 10 == number]
        assert stored(database, room.channel_id) == sorted(mine)
        assert [seq for seq, _ in sorted(mine)] == list(range(1, 21))
        times = database.execute(
            "SELECT seq, (extract(epoch FROM created_at) * 1000)::bigint FROM chat_messages"
            " WHERE channel_id = %s ORDER BY seq",
            (room.channel_id,),
        )
        told = sorted((r.seq, r.ts) for n, r in enumerate(records) if n // 2 % 10 == number)
        assert told == times
        assert len({ts for _, ts in times}) == 20, "the time rises with the number"
        assert [ts for _, ts in times] == sorted(ts for _, ts in times)
        assert database.execute(
            "SELECT last_seq, therapist_unread, prospect_unread FROM chat_channels WHERE id = %s",
            (room.channel_id,),
        ) == [(20, 20, 0)]


async def test_one_workers_messages_keep_the_order_of_their_sending(database: Database):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, _), trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(store.append, draft(room, str(number)))
            await trio.testing.wait_all_tasks_blocked()
    assert stored(database, room.channel_id) == [(n + 1, str(n)) for n in range(50)]


async def test_the_same_client_message_id_at_once_from_two_workers_is_one_message(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    client_id = str(uuid.uuid4())
    async with opened_store(database, redis_url) as one, opened_store(database, redis_url) as two:
        records: list[Record] = await gather(
            *(
                lambda n=n: (one, two)[n % 2].store.append(draft(room, "hi", client_id=client_id))
                for n in range(50)
            )
        )
        later = await two.store.append(draft(room, "next"))
    assert stored(database, room.channel_id) == [(1, "hi"), (2, "next")]
    assert len({(r.seq, r.ts, r.event, r.details) for r in records}) == 1, "one reply for all"
    assert records[0].reply().client_message_id == client_id
    assert later.seq == 2, "duplicates take no number"
    ((audited,),) = database.execute("SELECT count(*) FROM chat_audit")
    assert audited == 2


async def test_the_same_client_message_id_with_other_words_is_refused(database: Database):
    (room,) = make_rooms(database)
    client_id = str(uuid.uuid4())
    async with opened_store(database) as (store, delivered):
        await store.append(draft(room, "hi", client_id=client_id))
        with pytest.raises(ClientMessageIdReused):
            await store.append(draft(room, "other", client_id=client_id))
        assert (await store.append(draft(room, "hi", client_id=client_id))).seq == 1
    assert stored(database, room.channel_id) == [(1, "hi")]
    assert [record.seq for _, record in delivered] == [1, 1]


async def test_duplicates_and_conflicts_within_a_batch_are_told_apart(database: Database):
    (room,) = make_rooms(database)
    client_id = str(uuid.uuid4())
    async with opened_store(database) as (store, _):
        outcomes = await store._append_batch(
            [
                draft(room, "a", client_id=client_id),
                draft(room, "b"),
                draft(room, "a", client_id=client_id),
                draft(room, "c", client_id=client_id),
            ]
        )
    first, second, again, conflict = outcomes
    assert isinstance(first, Record) and isinstance(second, Record) and isinstance(again, Record)
    assert (first.seq, second.seq) == (1, 2)
    assert (again.event, again.details) == (first.event, first.details)
    assert isinstance(conflict, ClientMessageIdReused)
    assert stored(database, room.channel_id) == [(1, "a"), (2, "b")]


async def test_a_client_message_id_belongs_to_its_sender_and_channel(database: Database):
    here, there = make_rooms(database, 2)
    client_id = str(uuid.uuid4())
    async with opened_store(database) as (store, _):
        records = await gather(
            lambda: store.append(draft(here, "a", client_id=client_id)),
            lambda: store.append(draft(here, "b", client_id=client_id, by_therapist=True)),
            lambda: store.append(draft(there, "c", client_id=client_id)),
            lambda: store.append(draft(there, "d", client_id=client_id, by_therapist=True)),
        )
    assert sorted(record.seq for record in records) == [1, 1, 2, 2]


async def test_an_append_asked_again_under_its_message_id_is_one_message(database: Database):
    (room,) = make_rooms(database)
    message_id = str(uuid.uuid4())
    async with opened_store(database) as (store, _):
        first = await store.append(draft(room, "a", message_id=message_id))
        again = await store.append(draft(room, "a", message_id=message_id))
    assert (again.seq, again.event, again.details) == (first.seq, first.event, first.details)
    assert stored(database, room.channel_id) == [(1, "a")]


async def test_a_message_that_cannot_be_stored_fails_alone(database: Database):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, _):
        outcomes = await gather(
            lambda: store.append(draft(room, "first")),
            *(lambda n=n: store.append(draft(room, "\0" if n == 2 else f"{n}")) for n in range(5)),
        )
    assert isinstance(outcomes.pop(3), StatementFailed)
    assert sorted(record.seq for record in outcomes) == [1, 2, 3, 4, 5]
    assert store.postgres.up


async def test_an_append_leaves_everything_that_goes_with_a_message(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    before = time.time_ns() // 1_000_000
    async with opened_store(database, redis_url) as (store, delivered):
        await store.append(draft(room, "from the prospect"))
        await store.append(draft(room, "one", by_therapist=True))
        record = await store.append(draft(room, "é" * 150, by_therapist=True))
        assert delivered[-1] == (room.channel_id, record)
        after = time.time_ns() // 1_000_000
        (listed,) = await store.channels_of(room.therapist.id, as_prospect=False)
        assert listed.unread_count == 1
        assert listed.last_message_preview == "é" * 100
        assert listed.last_message_at == record.reply().sent_at
        (listed,) = await store.channels_of(room.prospect.id, as_prospect=True)
        assert listed.unread_count == 2
        await store.mark_read(room.channel_id, as_therapist=False)
        (listed,) = await store.channels_of(room.prospect.id, as_prospect=True)
        assert listed.unread_count == 0
        (listed,) = await store.channels_of(room.therapist.id, as_prospect=False)
        assert listed.unread_count == 1, "the other's count stays"
    reply = record.reply()
    assert before <= record.ts <= after
    assert (reply.sender_id, reply.sender_email) == (room.therapist.id, "tess@example.com")
    assert (reply.sender_first_name, reply.sender_last_name) == ("Tess", "Smith")
    assert (reply.content, reply.status, reply.seq) == ("é" * 150, "SENT", 3)
    assert database.execute(
        "SELECT actor, impersonator, user_id, action, channel_id, outcome, host(address),"
        " request_id FROM chat_audit WHERE user_id = %s LIMIT 1",
        (room.therapist.id,),
    ) == [
        ("user_actor", None, room.therapist.id, "message_sent", room.channel_id, "ok",
         "203.0.113.9", "request-1"),
    ]  # fmt: skip


async def test_a_message_and_its_audit_row_are_stored_together_or_not_at_all(database: Database):
    (room,) = make_rooms(database)
    database.execute("ALTER TABLE chat_audit ADD CHECK (action <> 'message_sent')")
    async with opened_store(database) as (store, delivered):
        with pytest.raises(StatementFailed):
            await store.append(draft(room, "a"))
    assert stored(database, room.channel_id) == []
    assert delivered == []


async def test_times_rise_also_when_the_clock_was_ahead(database: Database):
    (room,) = make_rooms(database)
    database.execute("UPDATE chat_channels SET last_message_at = now() + interval '20 seconds'")
    async with opened_store(database) as (store, _):
        ahead = time.time() * 1000 + 15_000
        times = [(await store.append(draft(room, str(n)))).ts for n in range(3)]
        assert times[0] > ahead, "it goes on from the channel's newest"
        assert times == sorted(set(times))
        database.execute("UPDATE chat_channels SET last_message_at = now() + interval '1 day'")
        late = await store.append(draft(room, "x"))
        assert late.ts < ahead, "a clock that was a day ahead is not followed"


async def test_a_channel_that_is_gone_says_so(database: Database):
    (room,) = make_rooms(database)
    gone = room._replace(channel_id=room.channel_id + 1)
    async with opened_store(database) as (store, _):
        results = await gather(
            lambda: store.append(draft(gone, "a")),
            lambda: store.append(draft(room, "b")),
            lambda: store.history(gone.channel_id, None, head=0),
        )
        assert isinstance(results[0], ChannelGone)
        assert results[1].seq == 1
        assert isinstance(results[2], ChannelGone)


# History


async def test_history_is_the_newest_or_what_comes_after_a_cursor(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    insert_messages(database, room, 450)
    channel_id = room.channel_id
    async with opened_store(database, redis_url) as (store, _):
        newest = await store.history(channel_id, None, head=0)
        assert (seqs(newest), newest.head, newest.reset) == (list(range(401, 451)), 450, False)
        assert seqs(await store.history(channel_id, None, head=0, size=7)) == list(range(444, 451))
        assert seqs(await store.history(channel_id, 0, head=0)) == list(range(1, 201))
        assert seqs(await store.history(channel_id, 200, head=0)) == list(range(201, 401))
        assert seqs(await store.history(channel_id, 400, head=0)) == list(range(401, 451))
        end = await store.history(channel_id, 450, head=0)
        assert (end.records, end.head, end.reset) == ([], 450, False)
        ahead = await store.history(channel_id, 451, head=0)
        assert (seqs(ahead), ahead.head, ahead.reset) == (list(range(401, 451)), 450, True)
        record = newest.records[-1]
        assert record.reply().content == "text 450"
        assert record.reply().sender_first_name == "Pat0"


async def test_what_a_channel_missed_is_not_read_after_a_crowds_pages(database: Database):
    """Live messages wait for it."""
    (room,) = make_rooms(database)
    insert_messages(database, room, 450)
    read: list[Page] = []

    async def join(after: int) -> None:
        read.append(await store.history(room.channel_id, after, head=450))

    async with opened_store(database) as (store, _), trio.open_nursery() as nursery:
        await store.heads({room.channel_id: 0})  # there is a connection
        for after in range(200):
            nursery.start_soon(join, after)
        await trio.testing.wait_all_tasks_blocked()
        page = await store.missed(room.channel_id, 448, head=450)
        assert seqs(page) == [449, 450]
        assert len(read) < 100, "it waited for those who came before it"


async def test_an_empty_channels_history_is_empty(database: Database, redis_url: str):
    (room,) = make_rooms(database)
    async with opened_store(database, redis_url) as (store, _):
        assert await store.history(room.channel_id, None, head=0) == Page([], 0, False)
        assert await store.history(room.channel_id, 0, head=0) == Page([], 0, False)
        assert await store.history(room.channel_id, 3, head=0) == Page([], 0, True)


async def test_what_redis_proves_to_have_is_read_from_redis(database: Database, redis_url: str):
    (room,) = make_rooms(database)
    insert_messages(database, room, 80)
    async with opened_store(database, redis_url) as (store, _):
        sources = Sources()
        from_postgres = await store.history(room.channel_id, None, head=80)
        assert sources() == {"postgres": 1}
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(Keys(database.conninfo).recent(room.channel_id)) == 50)
            assert 3500 < client.ttl(Keys(database.conninfo).recent(room.channel_id)) <= 3600
        assert await store.history(room.channel_id, None, head=80) == from_postgres
        assert seqs(await store.history(room.channel_id, 70, head=80)) == list(range(71, 81))
        assert seqs(await store.history(room.channel_id, 30, head=80)) == list(range(31, 81))
        assert sources() == {"redis": 3}
        assert seqs(await store.history(room.channel_id, 29, head=80)) == list(range(30, 81))
        assert (await store.history(room.channel_id, 81, head=80)).reset
        assert sources() == {"postgres": 2}


async def test_appended_messages_are_read_from_redis_and_the_set_stays_small(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    async with opened_store(database, redis_url) as (store, _):
        records = [await store.append(draft(room, str(n))) for n in range(60)]
        with redis.Redis.from_url(redis_url) as client:
            key = Keys(database.conninfo).recent(room.channel_id)
            await until(lambda: client.zrange(key, -1, -1, withscores=True)[0][1] == 60)
            assert client.zcard(key) == 50
        sources = Sources()
        page = await store.history(room.channel_id, None, head=60)
        assert sources() == {"redis": 1}
        assert page.records == records[10:]


async def test_what_postgresql_says_of_a_message_is_what_redis_says(
    database: Database, redis_url: str
):
    """Byte for byte: the sorted set would keep two versions of one message otherwise."""
    (room,) = make_rooms(database)
    async with opened_store(database, redis_url) as (store, _):
        appended = [
            await store.append(draft(room, "a", client_id=str(uuid.uuid4()))),
            await store.append(draft(room, "b", by_therapist=True)),
        ]
        assert (await store._page_batch([_page_key(room)]))[0] == Page(appended, 2)


def _page_key(room: Room) -> Any:
    from storage.store import _PageKey

    return _PageKey(room.channel_id, None, 50, 50, 0)


async def test_a_forgotten_set_is_rebuilt(database: Database, redis_url: str):
    (room,) = make_rooms(database)
    insert_messages(database, room, 60)
    async with opened_store(database, redis_url) as (store, _):
        await store.history(room.channel_id, None, head=60)
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(Keys(database.conninfo).recent(room.channel_id)) == 50)
            client.flushall()
            sources = Sources()
            assert len((await store.history(room.channel_id, None, head=60)).records) == 50
            assert sources() == {"postgres": 1}
            await until(lambda: client.zcard(Keys(database.conninfo).recent(room.channel_id)) == 50)
        assert len((await store.history(room.channel_id, None, head=60)).records) == 50
        assert sources() == {"redis": 1}


@pytest.mark.parametrize("broken", ["hole", "stale", "strange bytes", "no beginning"])
async def test_a_set_that_proves_nothing_is_not_used(
    database: Database, redis_url: str, broken: str
):
    (room,) = make_rooms(database)
    insert_messages(database, room, 20)
    key = Keys(database.conninfo).recent(room.channel_id)
    async with opened_store(database, redis_url) as (store, _):
        await store.history(room.channel_id, None, head=20)
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(key) == 20)
            if broken == "hole":
                client.zremrangebyscore(key, 7, 7)
            elif broken == "stale":
                client.zremrangebyscore(key, 20, 20)
            elif broken == "no beginning":
                client.zremrangebyscore(key, 1, 5)
            else:
                client.zremrangebyscore(key, 7, 7)
                client.zadd(key, {b"7 hello\n": 7})
        sources = Sources()
        page = await store.history(room.channel_id, None, head=20)
        assert seqs(page) == list(range(1, 21))
        assert sources() == {"postgres": 1}
        with trio.fail_after(2):  # until it is mended
            while sources() != {"redis": 1}:
                page = await store.history(room.channel_id, None, head=20)
                assert seqs(page) == list(range(1, 21))


async def test_a_message_names_its_author_as_when_it_was_sent_wherever_it_comes_from(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    key = Keys(database.conninfo).recent(room.channel_id)
    room = room._replace(
        prospect=msgspec.structs.replace(room.prospect, first_name="Mary Ann", last_name="Smith")
    )
    async with opened_store(database, redis_url) as (store, delivered):
        client_id = str(uuid.uuid4())
        sent = await store.append(draft(room, "text", client_id=client_id))
        database.execute("UPDATE users SET first_name = 'Other', last_name = 'Name'")
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(key) == 1)
            warm = (await store.history(room.channel_id, None, head=1)).records
            client.delete(key)
            cold = (await store.history(room.channel_id, None, head=1)).records
        assert warm == cold == [sent] == [record for _, record in delivered]
        reply = sent.reply()
        assert (reply.sender_first_name, reply.sender_last_name) == ("Mary Ann", "Smith")
        again = await store.append(
            msgspec.structs.replace(
                draft(room, "text", client_id=client_id),
                sender=msgspec.structs.replace(room.prospect, first_name="Other"),
            )
        )
        assert again == sent


async def test_a_message_is_published_once_to_other_workers(database: Database, redis_url: str):
    (room,) = make_rooms(database)
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        pubsub.subscribe(Keys(database.conninfo).live(room.channel_id))
        assert pubsub.get_message(timeout=2)["type"] == "subscribe"
        async with opened_store(database, redis_url) as (store, _):
            record = await store.append(draft(room, "a"))
            await store.history(room.channel_id, None, head=1)  # rebuilding publishes nothing
            await trio.sleep(0.1)
        assert Record.decode(pubsub.get_message(timeout=2)["data"]) == record
        assert pubsub.get_message(timeout=0.1) is None


async def test_one_page_before_a_message_named_by_its_id_or_uuid(database: Database):
    here, there = make_rooms(database, 2)
    insert_messages(database, here, 30)
    insert_messages(database, there, 3)
    rows = database.execute(
        "SELECT id, message_id FROM chat_messages WHERE channel_id = %s AND seq = 20",
        (here.channel_id,),
    )
    row_id, message_id = rows[0]
    async with opened_store(database) as (store, _):
        for name in (row_id, message_id):
            page = await store.page_before(here.channel_id, name, size=5)
            assert page is not None
            assert seqs(page) == [15, 16, 17, 18, 19]
            assert await store.page_before(there.channel_id, name, size=5) is None
        page = await store.page_before(here.channel_id, row_id, size=200)
        assert page is not None
        assert seqs(page) == list(range(1, 20))
        for unknown in (2**63 - 1, uuid.uuid4()):
            assert await store.page_before(here.channel_id, unknown, size=5) is None
        first = database.execute("SELECT min(id) FROM chat_messages")[0][0]
        assert await store.page_before(here.channel_id, first, size=5) == []


async def test_heads_are_those_that_have_more(database: Database):
    rooms = make_rooms(database, 3)
    for room, count in zip(rooms, (5, 3, 0), strict=True):
        insert_messages(database, room, count)
    ids = [room.channel_id for room in rooms]
    async with opened_store(database) as (store, _):
        assert await store.heads({ids[0]: 4, ids[1]: 3, ids[2]: 0, 10**9: 0}) == {ids[0]: 5}
        assert await store.heads(dict.fromkeys(ids, 0)) == {ids[0]: 5, ids[1]: 3}
        assert await store.heads({}) == {}
        many = {n + 10**6: 0 for n in range(4500)} | {ids[0]: 0}
        assert await store.heads(many) == {ids[0]: 5}


# People and channels


async def test_access_says_who_somebody_is_and_what_a_channel_is_to_them(database: Database):
    room, other = make_rooms(database, 2)
    insert_messages(database, room, 3)
    async with opened_store(database) as (store, _):
        access = await store.access("clerk_tess", room.channel_id)
        assert access.user == room.therapist
        assert access.channel == ChannelAccess(room.channel_id, 3, True, False)
        access = await store.access("clerk_pat0", room.channel_id)
        assert access.user == room.prospect
        assert access.channel == ChannelAccess(room.channel_id, 3, False, True)
        access = await store.access("clerk_pat0", other.channel_id)
        assert access.channel == ChannelAccess(other.channel_id, 0, False, False)
        assert (await store.access("clerk_pat0", None)).channel is None
        assert (await store.access("clerk_pat0", 10**9)).channel is None
        for channel_id in (room.channel_id, None, 10**9):
            assert await store.access("clerk_nobody", channel_id) == (None, None)
        database.execute("UPDATE users SET is_active = false WHERE clerk_id = 'clerk_pat0'")
        inactive = (await store.access("clerk_pat0", room.channel_id)).user
        assert inactive is not None
        assert inactive.is_active is False


async def test_one_person_may_be_both_sides_of_a_channel_or_a_therapist_and_a_prospect(
    database: Database,
):
    (room,) = make_rooms(database)
    database.execute(
        "INSERT INTO therapists (user_id) VALUES (%s), (%s)", (room.prospect.id, room.prospect.id)
    )
    (first,) = database.execute(
        "SELECT min(id) FROM therapists WHERE user_id = %s", (room.prospect.id,)
    )
    async with opened_store(database) as (store, _):
        access = await store.access("clerk_pat0", room.channel_id)
        assert access.user is not None
        assert access.user.therapist_id == first[0]
        assert access.channel == (room.channel_id, 0, False, True, "active"), (
            "here they are the prospect"
        )
        own, made = await store.create_channel(first[0], room.prospect.id, None, for_user=1)
        assert made
        assert (await store.access("clerk_pat0", own.id)).channel == (
            own.id,
            0,
            True,
            True,
            "active",
        )


async def test_many_lookups_at_once_get_each_their_own_answer(database: Database):
    rooms = make_rooms(database, 20)
    async with opened_store(database) as (store, _):
        found = await gather(
            *(
                lambda n=n: store.access(f"clerk_pat{n % 20}", rooms[n % 20].channel_id)
                for n in range(100)
            )
        )
    for n, access in enumerate(found):
        assert access.user == rooms[n % 20].prospect
        assert access.channel.channel_id == rooms[n % 20].channel_id
        assert access.channel.is_prospect


@pytest.mark.parametrize(
    ("employer", "sponsored"),
    [
        ("is_active = true, sponsors_chat = true", True),
        ("is_active = false, sponsors_chat = true", False),
        ("is_active = true, sponsors_chat = false", False),
        ("is_active = false, sponsors_chat = false", False),
        ("is_active = true", True),
        ("is_active = false", False),
        (None, False),
    ],
)
async def test_an_employer_sponsors_if_active_and_not_told_otherwise(
    database: Database, employer: str | None, sponsored: bool
):
    (room,) = make_rooms(database)
    if employer is not None:
        if "sponsors_chat" not in employer:  # the main application's table may not have it
            database.execute("ALTER TABLE employers DROP COLUMN sponsors_chat")
            assert migrate(database.conninfo) == ["function_chat_people"]
        database.execute("INSERT INTO employers (id, name) VALUES (5, 'ACME')")
        database.execute(f"UPDATE employers SET {employer}")
    database.execute("UPDATE users SET employer_id = 5 WHERE clerk_id = 'clerk_pat0'")
    async with opened_store(database) as (store, _):
        access = await store.access("clerk_pat0", room.channel_id)
        assert access.user is not None
        assert access.user.sponsored is sponsored


async def test_a_user_with_nothing_filled_in_is_read(database: Database):
    database.execute("INSERT INTO users (clerk_id, email) VALUES ('clerk_bare', 'b@example.com')")
    async with opened_store(database) as (store, _):
        found = (await store.access("clerk_bare", None)).user
        assert found is not None
        assert (found.first_name, found.last_name, found.full_name) == ("", "", "")
        assert (found.subscription_status, found.sponsored) == ("", False)
        assert found.therapist_id is None


async def test_two_workers_that_create_a_pairs_channel_make_one(database: Database):
    (room,) = make_rooms(database)
    database.execute("DELETE FROM chat_channels")
    therapist_id = room.therapist.therapist_id
    assert therapist_id is not None

    def create(store: Store) -> Any:
        return lambda: store.create_channel(
            therapist_id, room.prospect.id, "Name", for_user=room.therapist.id
        )

    async with opened_store(database) as one, opened_store(database) as two:
        results = await gather(*(create((one, two)[n % 2].store) for n in range(12)))
        assert len({channel.id for channel, _ in results}) == 1
        assert [made for _, made in results].count(True) == 1
        channel = results[0][0]
        assert (channel.channel_name, channel.status, channel.unread_count) == ("Name", "active", 0)
        assert (channel.therapist_name, channel.therapist_title) == ("Dr Tess", "PhD")
        assert channel.last_message_at is None
    assert database.execute("SELECT count(*) FROM chat_channels") == [(1,)]


async def test_a_pair_is_known_if_both_exist(database: Database):
    (room,) = make_rooms(database)
    therapist_id = room.therapist.therapist_id
    assert therapist_id is not None
    async with opened_store(database) as (store, _):
        assert await store.pair(therapist_id, room.prospect.id) == (room.therapist.id, True)
        assert await store.pair(therapist_id, 10**9) is None
        assert await store.pair(10**9, room.prospect.id) is None
        database.execute("UPDATE users SET is_active = false WHERE id = %s", (room.prospect.id,))
        assert await store.pair(therapist_id, room.prospect.id) == (room.therapist.id, False)


async def test_channels_are_listed_latest_first_to_those_in_them(database: Database):
    rooms = make_rooms(database, 3)
    async with opened_store(database) as (store, _):
        await store.append(draft(rooms[1], "a"))
        await store.append(draft(rooms[0], "b"))
        mine = await store.channels_of(rooms[0].therapist.id, as_prospect=False)
        assert [c.id for c in mine] == [rooms[n].channel_id for n in (0, 1, 2)]
        assert (mine[0].prospect_first_name, mine[0].prospect_email) == ("Pat0", "pat0@example.com")
        theirs = await store.channels_of(rooms[1].prospect.id, as_prospect=True)
        assert [c.id for c in theirs] == [rooms[1].channel_id]
        assert await store.channels_of(rooms[1].prospect.id, as_prospect=False) == []
        assert await store.channels_of(10**9, as_prospect=True) == []


async def test_an_export_names_its_people_and_counts(database: Database):
    (room,) = make_rooms(database)
    insert_messages(database, room, 4)
    async with opened_store(database) as (store, _):
        header = await store.export_header(room.channel_id)
        assert header is not None
        assert (header.therapist_name, header.therapist_email) == ("Dr Tess", "tess@example.com")
        assert (header.client_first_name, header.client_email) == ("Pat0", "pat0@example.com")
        assert header.messages == 4
        assert await store.export_header(10**9) is None


# Tickets


def a_ticket(**changes: Any) -> Ticket:
    fields: dict[str, Any] = {
        "subject": "user_1",
        "session_id": "sess_1",
        "impersonator": None,
        "session_expires_at": 1_900_000_000.25,
    }
    return Ticket(**(fields | changes))


async def test_a_ticket_opens_the_channel_of_its_first_use_on_any_worker(database: Database):
    async with opened_store(database) as one, opened_store(database) as two:
        await one.store.issue_ticket(b"digest", a_ticket(), seconds=30)
        results = await gather(
            *(
                lambda n=n: (one, two)[n % 2].store.redeem_ticket(
                    b"digest", channel_id=1 + n % 3, lease=60
                )
                for n in range(12)
            )
        )
        opened = [n % 3 for n, result in enumerate(results) if result is not None]
        assert len(opened) == 4 and len(set(opened)) == 1, "one channel's, whichever was first"
        assert {r for r in results if r is not None} == {a_ticket()}


async def test_a_ticket_ends_with_its_sessions_lease(database: Database):
    soon = a_ticket(session_expires_at=time.time() + 5)
    async with opened_store(database) as (store, _):
        await store.issue_ticket(b"digest", soon, seconds=30)
        assert await store.redeem_ticket(b"digest", channel_id=1, lease=60)
        [(lives,)] = database.execute(
            "SELECT extract(epoch FROM expires_at)::float8 FROM chat_tickets"
        )
        assert lives == pytest.approx(soon.session_expires_at + 60, abs=0.01)
        assert await store.redeem_ticket(b"digest", channel_id=1, lease=600)
        assert database.execute(
            "SELECT expires_at > now() + interval '66 s' FROM chat_tickets"
        ) == [(False,)], "which its later uses do not prolong"
        over = "SET session_expires_at = now() - interval '1 s'"
        database.execute(f"UPDATE chat_tickets {over}")
        assert await store.redeem_ticket(b"digest", channel_id=1, lease=60), "within the lease"
        database.execute("UPDATE chat_tickets SET expires_at = now()")
        assert await store.redeem_ticket(b"digest", channel_id=1, lease=60) is None
        await store.issue_ticket(b"other", soon, seconds=30)  # sweeps it
        assert database.execute("SELECT count(*) FROM chat_tickets") == [(1,)]
        database.execute(f"UPDATE chat_tickets {over}")
        assert await store.redeem_ticket(b"other", channel_id=1, lease=60) is None, "a first use"


async def test_an_old_or_unknown_ticket_is_none(database: Database):
    bare = a_ticket(session_id=None, impersonator="user_admin")
    async with opened_store(database) as (store, _):
        how: dict[str, Any] = {"channel_id": 1, "lease": 60}
        assert await store.redeem_ticket(b"unknown", **how) is None
        await store.issue_ticket(b"old", bare, seconds=0)
        await store.issue_ticket(b"new", bare, seconds=30)  # sweeps the old one, too
        assert database.execute("SELECT count(*) FROM chat_tickets") == [(1,)]
        await store.issue_ticket(b"old", bare, seconds=0)
        assert await store.redeem_ticket(b"old", **how) is None
        assert await store.redeem_ticket(b"new", **how) == bare


async def test_closing_the_store_ends_what_waits_on_it(database: Database):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, _):
        pass
    with trio.fail_after(5), pytest.raises(StoreUnavailable):
        await store._appends.submit(draft(room, "a"), seconds=0.1)


# Plans


async def test_no_statement_reads_a_whole_table_however_small_it_was_when_planned(
    database: Database, redis_url: str
):
    rooms = make_rooms(database, 3)
    tables = ["users", "therapists", "chat_channels", "chat_messages", "chat_tickets"]

    def whole_reads() -> dict[str, int]:
        rows = database.execute("SELECT relname, seq_scan FROM pg_stat_user_tables")
        return {name: scans for name, scans in rows if name in tables}

    room = rooms[0]
    insert_messages(database, room, 5)
    database.execute("ANALYZE")  # a table of one page: reading all of it looks best
    before = whole_reads()
    async with opened_store(database, redis_url) as (store, _):
        for _ in range(8):  # the sixth time PostgreSQL keeps a plan
            record = await store.append(draft(room, "text"))
            await store.access(room.therapist.clerk_id, room.channel_id)
            await store.history(room.channel_id, record.seq - 1, head=10**9)
            await store.page_before(room.channel_id, record.seq, size=5)
            await store.heads({room.channel_id: 0})
            await store.channels_of(room.therapist.id, as_prospect=True)
            await store.pair(1, room.prospect.id)
            await store.mark_read(room.channel_id, as_therapist=False)
            await store.export_header(room.channel_id)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    await until(lambda: database.execute(others) == [(1,)])  # a backend that ends tells its counts
    assert whole_reads() == before
