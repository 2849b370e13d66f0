"""The plan's arithmetic: more is never less, the worst hour holds, nonsense is refused."""

import math

import msgspec
import pytest

from bench.capacity.plan import (
    PORTS,
    WORKER_STREAMS,
    Answer,
    Deployment,
    Headroom,
    Unplannable,
    _Machine,
    plan,
)
from tests.bench.forged import forge_calibration, with_costs

CALIBRATION = forge_calibration()
USUAL = Deployment(clients=200_000, sends_per_second=20_000, cores=2, memory_gb=8)


def answer(deployment: Deployment = USUAL, **changes) -> Answer:
    deployment = msgspec.structs.replace(deployment, **changes)
    return plan(CALIBRATION.model, CALIBRATION.storage, deployment, known=CALIBRATION.known)


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("clients", [1, 1_000, 50_000, 200_000, 1_000_000, 5_000_000]),
        ("sends_per_second", [0, 100, 1_000, 5_000, 50_000]),
        ("fanout", [1, 2, 3, 6, 20, 200]),
    ],
)
def test_more_never_needs_fewer_nodes(what, values):
    nodes = [answer(**{what: value}).nodes for value in values]
    for ascending in zip(*nodes, strict=True):
        assert list(ascending) == sorted(ascending)
    assert nodes[-1].value > nodes[0].value


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("cores", [1, 2, 8, 32]),
        ("reconnect_within", [5, 60, 600]),
        ("stay_seconds", [60, 315, 3_600]),
        ("heartbeat", [2, 15, 60]),
    ],
)
def test_more_of_what_helps_never_needs_more_nodes(what, values):
    nodes = [answer(**{what: value}).nodes.value for value in values]
    assert nodes == sorted(nodes, reverse=True)


def test_one_may_always_die():
    little = answer(clients=1, sends_per_second=0)
    assert little.nodes.value == 2


def test_the_worst_hour_is_within_the_rule():
    hasty = Deployment(clients=100_000, sends_per_second=1_000, reconnect_within=1)
    assert answer(hasty).saturations[0].what == "workers' CPU, worst hour"
    for deployment in (USUAL, hasty, Deployment(clients=3_000_000, sends_per_second=9, cores=16)):
        found = answer(deployment)
        rule = found.headroom
        assert found.normal_cpu.value <= rule.normal_cpu
        assert found.worst_cpu.value <= rule.worst_cpu
        assert found.worst_streams_per_worker <= rule.streams * WORKER_STREAMS
        assert found.worst_memory.value <= rule.memory * deployment.memory_gb * 1e9
        assert all(each.used <= each.allowed for each in found.saturations)
        assert found.fastest_return <= deployment.reconnect_within


def test_the_worst_hour_is_that_of_a_dead_nodes_clients():
    found = answer()
    assert found.returning == math.ceil(200_000 / found.nodes.value)
    usual = 200_000 / USUAL.stay_seconds
    assert found.connects == pytest.approx(usual)
    assert found.worst_connects == pytest.approx(usual + 200_000 / found.nodes.value / 60)
    assert found.worst_cpu.value > found.normal_cpu.value
    assert found.everybody_back > found.fastest_return


def test_the_fullest_comes_first():
    shares = [each.used / each.allowed for each in answer().saturations]
    assert shares == sorted(shares, reverse=True)
    crammed = answer(memory_gb=1.0, cores=2, sends_per_second=1)
    assert "memory" in crammed.saturations[0].what


def test_memory_is_reckoned_with():
    assert answer(memory_gb=0.5).nodes.value > answer(memory_gb=64.0).nodes.value


def test_the_error_bars_enclose_the_answer_and_grow_with_the_errors():
    found = answer()
    assert found.nodes.low <= found.nodes.value <= found.nodes.high
    assert found.nodes.low < found.nodes.high
    worse = forge_calibration(noise=0.3)
    wide = plan(worse.model, worse.storage, USUAL).nodes
    assert (wide.high - wide.low) > (found.nodes.high - found.nodes.low)


def test_redis_is_split_when_one_core_does_not_do():
    dear = with_costs(CALIBRATION, "redis cpu", 40)
    split = plan(dear.model, dear.storage, USUAL)
    assert split.redis_shards.value > answer().redis_shards.value
    redis = next(each for each in split.saturations if "Redis" in each.what)
    assert redis.used <= redis.allowed


def test_postgres_is_one_and_is_said_when_it_is_too_small():
    dear = with_costs(CALIBRATION, "postgres cpu", 40)
    first = plan(dear.model, dear.storage, USUAL).saturations[0]
    assert "PostgreSQL" in first.what
    assert first.used > first.allowed


def test_storage_ports_and_files():
    found = answer()
    year = 365 * 86_400 * USUAL.mean_share
    assert found.message_storage == pytest.approx(20_000 * 450 * year)
    assert found.audit_storage == pytest.approx((20_000 + 2 * found.connects) * 250 * year)
    longer = answer(characters=1_100)
    assert longer.message_storage == pytest.approx(20_000 * 1_450 * year)
    assert found.load_balancer_connections == 400_000
    per_node = 200_000 / (found.nodes.value - 1)
    assert found.ports_per_node == math.ceil(per_node)
    assert found.addresses_per_node == math.ceil(per_node / PORTS)
    assert found.files_per_worker > per_node / USUAL.cores


def test_one_node_less_would_break_the_rule():
    found = answer()
    fewer = found.nodes.value - 1
    machine = _Machine(CALIBRATION.model, CALIBRATION.storage, USUAL, Headroom())
    assert machine._carry(found.nodes.value, 0.0)
    assert not machine._carry(fewer, 0.0)


def test_less_headroom_needs_fewer_nodes():
    tight = plan(
        CALIBRATION.model,
        CALIBRATION.storage,
        USUAL,
        headroom=Headroom(normal_cpu=0.9, worst_cpu=0.95, memory=0.95, streams=1.0),
    )
    assert tight.nodes.value < answer().nodes.value


def test_what_is_beyond_the_measurement_is_said():
    said = " ".join(answer().extrapolated)
    assert "workers: " in said and "measured up to 2" in said
    assert "Redis commands/s" in said
    small = Deployment(clients=2_000, sends_per_second=50, cores=1)
    assert answer(small).workers == 2
    assert answer(small).extrapolated == []


@pytest.mark.parametrize(
    "nonsense",
    [
        {"clients": 0},
        {"clients": -5},
        {"sends_per_second": -1.0},
        {"sends_per_second": math.nan},
        {"reconnect_within": 0.0},
        {"cores": 0},
        {"memory_gb": math.inf},
        {"characters": 9_000},
        {"mean_share": 2.0},
        {"stay_seconds": 1.0},
    ],
)
def test_nonsense_is_refused_by_its_name(nonsense):
    (name,) = nonsense
    with pytest.raises(Unplannable, match=name):
        Deployment(**{"clients": 10, "sends_per_second": 1.0} | nonsense)


def test_what_no_number_of_nodes_carries_is_said():
    with pytest.raises(Unplannable, match="no number"):
        # A worker without any stream takes more than a node has.
        answer(memory_gb=0.5, cores=64)
