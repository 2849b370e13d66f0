"""What the doctor is told of a Redis: each refusal by its name, and the least rights that do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trio

from protocol.confidential import Secret
from storage.embedded import EmbeddedValkey
from storage.redis import Keys
from storage.redis.examination import examine, key_pattern, rights, why_unreachable
from storage.redis.refusal import Refusal
from tests.storage.clusters import Cluster, running_cluster
from tests.storage.stores import NOWHERE
from tests.storage.test_redis_refused import USER, Users, users

KEYS = Keys({"host": "h", "port": 1, "dbname": "d"})

__all__ = ["users"]


@pytest.fixture(autouse=True)
async def time_limit():
    with trio.fail_after(60):
        yield


async def test_the_rights_that_are_asked_for_are_enough(users: Users):
    users.may("resetkeys resetchannels -@all", *rights(Secret(users.url), KEYS).split())
    assert (await examine(Secret(users.url), KEYS)) == ([], "unknown")
    users.may("resetkeys resetchannels +@all", *rights(Secret(users.url), KEYS).split())
    assert (await examine(Secret(users.url), KEYS)) == ([], "noeviction")


@pytest.mark.parametrize(
    "right", [each for each in rights(Secret(NOWHERE), KEYS).split() if each[0] == "+"]
)
async def test_each_right_that_is_missing_is_named(users: Users, right: str):
    users.may("resetkeys resetchannels -@all", *rights(Secret(users.url), KEYS).split())
    command = right.removeprefix("+")
    users.may("~* &* +@all", f"-{command}")
    refusals, _ = await examine(Secret(users.url), KEYS)
    not_needed = ("eval", "pubsub|numsub")  # the script is known here; all is published
    assert refusals == ([] if command in not_needed else [Refusal("command", command)])


@pytest.mark.parametrize(
    ("rules", "refusals"),
    [
        ("resetkeys", [Refusal("key")]),
        ("resetkeys %R~*", [Refusal("key")]),
        ("resetchannels", [Refusal("channel")]),
        ("-eval -evalsha", [Refusal("command", "evalsha")]),
        ("-evalsha -subscribe", [Refusal("command", "evalsha"), Refusal("command", "subscribe")]),
        ("off", [Refusal("login")]),
    ],
)
async def test_all_that_is_refused_is_named_at_once(
    users: Users, rules: str, refusals: list[Refusal]
):
    users.may("~* &* +@all", *rules.split())
    assert (await examine(Secret(users.url), KEYS)).refusals == refusals
    assert USER not in repr(refusals)


async def test_a_database_that_is_not_there_is_named(users: Users):
    users.may("~* &* +@all")
    assert (await examine(Secret(f"{users.url}/99"), KEYS)).refusals == [Refusal("database")]


async def test_a_memory_that_is_full_and_a_replica_are_named(folder: Path):
    with EmbeddedValkey(folder / "valkey", durable=False, config={"maxmemory": 1}) as server:
        examined = await examine(Secret(server.url), KEYS)
        assert examined == ([Refusal("memory")], "noeviction")
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("maxmemory", 0)
            admin.replicaof("127.0.0.1", 1)
        assert (await examine(Secret(server.url), KEYS)).refusals == [Refusal("write")]


async def test_one_that_is_not_there_is_told_so():
    with pytest.raises(redis.ConnectionError) as caught:
        await examine(Secret(NOWHERE), KEYS)
    assert why_unreachable(caught.value) == "nobody listens there"


async def test_an_error_that_is_its_own_cause_is_told_too():
    error = redis.ConnectionError()
    error.__cause__ = error
    assert why_unreachable(error) == "ConnectionError"


@pytest.fixture(scope="module")
def cluster(services_folder: Path) -> Iterator[Cluster]:
    with running_cluster(services_folder / "examined-cluster") as nodes:
        yield nodes


async def test_a_cluster_is_examined_node_by_node(cluster: Cluster):
    url = Secret(cluster.url.replace("://:", f"://{USER}:", 1))
    password = cluster.nodes[0].password
    start = ("reset", "on", f">{password}", "-@all", *rights(url, KEYS).split())
    for number in range(3):
        cluster.ask(number, "ACL", "SETUSER", USER, *start)
    assert await examine(url, KEYS) == ([], "unknown")
    cluster.ask(1, "ACL", "SETUSER", USER, "resetchannels")
    cluster.ask(2, "ACL", "SETUSER", USER, "-ssubscribe")
    refusals = (await examine(url, KEYS)).refusals
    assert set(refusals) == {Refusal("channel"), Refusal("command", "ssubscribe")}
    assert key_pattern(KEYS) in rights(url, KEYS)
