"""A Redis that answers and does not let us: what is said, how often it is asked, who waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
import trio
from structlog.testing import capture_logs

from protocol.confidential import Secret
from storage.contract import Eviction, Record
from storage.embedded import EmbeddedValkey
from storage.redis import Keys
from storage.redis.evictions import publish_eviction
from storage.redis.feed import DENIED_SECONDS
from storage.redis.recent import in_pieces
from tests.storage.stores import draft, make_rooms, opened_store
from tests.support.services import Database

LEAST = (
    "resetkeys resetchannels -@all ~sottovoce:* &sottovoce:* +eval +evalsha +zrange +zadd "
    "+zremrangebyscore +zremrangebyrank +expire +publish +pubsub|numsub +subscribe +unsubscribe "
    "+ping"
)
"""The rights that docs/how-to/redis.md asks for."""
NOT_NEEDED = "-config -info -hello -client -script -select -set -get -acl -command -pubsub"
USER = "canary-user"
SECONDS = 30.0
"""How long a step may take that needs a second or two on an idle machine."""


class Users:
    """The chat's user on a server, whose rights a test changes."""

    def __init__(self, valkey: EmbeddedValkey, admin: Any) -> None:
        self.url = f"redis://{USER}:{USER}@127.0.0.1:{valkey.port}"
        self._admin = admin

    def may(self, rules: str, *more: str) -> None:
        """Has these rights and no others; who is connected is asked to come again."""
        start = ("reset", "on", f">{USER}")
        self._admin.execute_command("ACL", "SETUSER", USER, *start, *rules.split(), *more)
        self._admin.execute_command("CLIENT", "KILL", "USER", USER)

    def refused(self) -> int:
        """How many commands of it were refused."""
        log: Any = self._admin.acl_log(1000)
        return sum(int(each["count"]) for each in log)


@pytest.fixture
def users(valkey: EmbeddedValkey) -> Iterator[Users]:
    with redis.Redis.from_url(valkey.url) as admin:
        admin.flushall()
        admin.execute_command("ACL", "LOG", "RESET")
        try:
            yield Users(valkey, admin)
        finally:
            admin.execute_command("ACL", "DELUSER", USER)


async def until(look: Callable[[], Any]) -> None:
    with trio.fail_after(SECONDS):
        while not look():
            await trio.sleep(0.02)


@contextmanager
def taking_no_longer_than(seconds: float) -> Iterator[None]:
    began = trio.current_time()
    yield
    assert trio.current_time() - began < seconds


@pytest.mark.parametrize("rules", [LEAST, f"~* &* +@all {NOT_NEEDED}"], ids=["least", "all but"])
async def test_two_stores_hear_each_other_with_the_least_rights(
    users: Users, database: Database, rules: str
):
    users.may(rules)
    (room,) = make_rooms(database)
    evicted: list[Any] = []
    async with opened_store(database, users.url) as one, opened_store(database, users.url) as two:
        two.store.on_evicted = evicted.extend
        await until(lambda: one.store.feed.connected and two.store.feed.connected)
        two.store.feed.want(room.channel_id)
        assert await two.store.feed.listening(room.channel_id, seconds=SECONDS)
        records = [await one.store.append(draft(room, f"text {n}")) for n in range(3)]
        await until(lambda: [record for _, record in two.delivered] == records)
        page = await two.store.history(room.channel_id, None, head=3)
        assert page.records == records
        publish_eviction(Secret(users.url), Keys(database.conninfo), Eviction(user_id=7))
        await until(lambda: evicted == [Eviction(user_id=7)])
        await trio.sleep(3)  # longer than between two probes
        assert one.store.redis.up and two.store.redis.up


REFUSED = [
    ("-evalsha", "command evalsha"),
    ("-eval -evalsha -script", "command evalsha"),
    ("-zrange", "command zrange"),
    ("-zadd", "command zadd"),
    ("-zremrangebyrank", "command zremrangebyrank"),
    ("-expire", "command expire"),
    ("-publish", "command publish"),
    ("-subscribe", "command subscribe"),
    ("resetkeys ~other:*", "key"),
    ("resetkeys %R~sottovoce:*", "key"),
    ("resetchannels", "channel"),
    ("resetchannels &sottovoce:*:control", "channel"),
    ("-@all", "command "),
    ("off", "login"),
]
"""(what is taken away, what the log says of it)"""


@pytest.mark.parametrize(("rules", "said"), REFUSED, ids=[rules for rules, _ in REFUSED])
async def test_what_is_refused_is_said_and_done_without(
    users: Users, database: Database, rules: str, said: str
):
    users.may(LEAST, *rules.split())
    (room,) = make_rooms(database)
    with capture_logs() as logs:
        async with opened_store(database, users.url) as (store, _):
            await store.history(room.channel_id, None, head=0)
            await until(lambda: not store.redis.up)
            record = await store.append(draft(room, "text"))
            assert not await store.feed.listening(room.channel_id, seconds=SECONDS)
            assert (await store.history(room.channel_id, None, head=1)).records == [record]
            await trio.sleep(1.0)  # in which a server that had been started again would be found
            assert not store.redis.up
            if said != "login" and rules not in ("-@all", "-subscribe", "resetchannels"):
                assert store.feed.connected, "of evictions it hears all the same"
    failures = [line["refused"] for line in logs if line["event"] == "redis_failed"]
    assert any(refused.startswith(said) for refused in failures)
    assert len(set(failures)) == len(failures) <= 2, "of the scripts, and of the feed"
    assert USER not in repr(logs)


@pytest.mark.parametrize("rules", ["-evalsha", "-subscribe", "-@all", "off"])
async def test_what_is_refused_is_asked_for_seldom_until_it_is_allowed(
    users: Users, database: Database, rules: str
):
    users.may(LEAST, rules)
    async with opened_store(database, users.url) as (store, _):
        await until(lambda: not store.redis.up)
        began, asked = trio.current_time(), users.refused()
        await trio.sleep(DENIED_SECONDS)
        assert not store.redis.up, "what else is allowed is no reason"
        tries = (trio.current_time() - began) / (DENIED_SECONDS / 2) + 1
        # A probe and the feed; each connects, says who it is, and asks for a thing, at most twice.
        assert users.refused() - asked <= 2 * 4 * tries
        users.may(LEAST)
        await until(lambda: store.redis.up and store.feed.connected)


async def test_who_waits_for_a_subscription_is_not_kept_by_one_that_is_refused(
    users: Users, database: Database
):
    users.may(LEAST, "resetchannels", f"&{Keys(database.conninfo).control.decode()}")
    async with opened_store(database, users.url) as (store, _):
        store.feed.want(7)
        with taking_no_longer_than(SECONDS / 2):
            assert not await store.feed.listening(7, seconds=SECONDS)


def test_writes_are_cut_into_pieces_of_a_size_in_their_order():
    def record(seq: int, size: int) -> Record:
        return Record(seq, 0, b"x" * size, b"")

    small = [record(seq, 30) for seq in range(1, 8)]
    large = record(8, 500)
    writes = [(1, small[:2], True), (2, small, False), (3, [large], True), (4, small[:1], True)]
    pieces = list(in_pieces(writes, 100))
    assert [(c, r, n) for c, r, n in _joined(pieces)] == writes
    for piece in pieces:
        sizes = [len(each.event) for _, records, _ in piece for each in records]
        assert 0 < sum(sizes) <= 100 or sizes == [500]
    assert list(in_pieces(writes, 10_000)) == [writes]


def _joined(pieces: list[Any]) -> list[Any]:
    found: list[Any] = []
    for channel_id, records, new in (write for piece in pieces for write in piece):
        if found and found[-1][0] == channel_id:
            found[-1] = (channel_id, found[-1][1] + records, new)
        else:
            found.append((channel_id, records, new))
    return found
