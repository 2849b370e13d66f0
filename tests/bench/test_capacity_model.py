"""The fit finds what it cost, says how sure it is, and drops what cannot be told."""

import random

import msgspec
import pytest

from bench.capacity.model import (
    TooFew,
    check,
    done,
    fit,
    fit_model,
    heard_of,
    heartbeats_of,
    lookups_of,
    work_of,
)
from bench.capacity.points import FULL, Load
from tests.bench.forged import COSTS, WAKING, forge


def test_it_finds_the_costs_of_measurements_without_noise():
    model = fit_model(forge(), (quantities := ("worker cpu", "rss", "redis bytes out")))
    for quantity in quantities:
        for held_out in (False, True):
            for each in check(model, forge(), [quantity], held_out=held_out):
                assert abs(each.off) < 0.03, each
    streams = model.fits["rss"].cost("streams")
    assert streams.value == pytest.approx(COSTS["rss"]["streams"], rel=1e-6)


def test_it_finds_them_through_noise_and_its_errors_are_as_large_as_they_say():
    """Of many noisy runs, the true cost of a stream lies within two standard errors in most."""
    inside = 0
    for seed in range(20):
        cost = fit_model(forge(noise=0.1, seed=seed), ["rss"]).fits["rss"].cost("streams")
        assert cost.value == pytest.approx(COSTS["rss"]["streams"], rel=0.15)
        inside += cost.low <= COSTS["rss"]["streams"] <= cost.high
    assert inside >= 16


def test_held_out_points_are_predicted_and_have_no_part_in_the_fit():
    measured = forge(noise=0.03)
    model = fit_model(measured, ["worker cpu"])
    assert all(
        abs(each.off) < 0.15 for each in check(model, measured, ["worker cpu"], held_out=True)
    )
    spoilt = [
        type(each)(
            load=each.load,
            held_out=each.held_out,
            values={**each.values, "worker cpu": 99.0} if each.held_out else each.values,
        )
        for each in measured
    ]
    assert fit_model(spoilt, ["worker cpu"]) == model


def test_a_wrong_model_is_seen_in_the_held_out_points():
    """The check can fail: a cost that the points of the fit do not have."""
    measured = [
        type(each)(
            load=each.load,
            held_out=each.held_out,
            values=each.values | {"worker cpu": each.values["worker cpu"] * (1 + each.held_out)},
        )
        for each in forge()
    ]
    checks = check(fit_model(measured, ["worker cpu"]), measured, ["worker cpu"], held_out=True)
    assert checks
    assert all(each.off < -0.3 for each in checks)


def test_the_points_held_out_combine_what_the_others_vary():
    held = [point.load for session in FULL for point in session.points if point.held_out]
    fitted = [point.load for session in FULL for point in session.points if not point.held_out]
    assert len(held) >= 7
    assert not {load.name for load in held} & {load.name for load in fitted}
    assert {load.workers for load in held} == {1, 2}
    assert {load.fanout for load in held} == {2, 6}
    assert any(load.connects and load.sends for load in held)


def test_what_would_give_something_back_is_dropped():
    chance = random.Random(4)
    works = [
        {"streams": chance.uniform(1, 100), "sends": chance.uniform(1, 100), "crowded": 0.0}
        for _ in range(20)
    ]
    values = [5 * work["streams"] - 0.5 * work["sends"] for work in works]
    found = fit(["streams", "sends"], works, values, "bytes")
    assert found.dropped == ["sends"]
    assert found.cost("sends") == (0.0, 0.0)


def test_too_few_points_are_refused():
    with pytest.raises(TooFew):
        fit(["streams", "sends"], [{"streams": 1.0, "sends": 1.0}] * 3, [1.0] * 3, "bytes")


def test_a_worker_is_woken_for_each_when_idle_and_never_more_often_than_it_can():
    def wakings(sends: float, workers: int = 1) -> float:
        return WAKING.wakings(work_of(Load(workers=workers, streams=10_000, sends=sends), 5_000))

    assert wakings(1) == pytest.approx(1, rel=0.01)
    assert wakings(1e9) == pytest.approx(1 / WAKING.kept_seconds, rel=0.01)
    assert wakings(2_000, workers=2) == pytest.approx(2 * wakings(1_000))


def test_what_goes_to_postgresql_goes_together_with_its_own_kind_only():
    load = Load(workers=1, streams=10_000, sends=100.0, connects=100.0)
    work = work_of(load, 5_000)
    assert WAKING.connects == 2 and WAKING.lookups == 0
    kept = WAKING.kept_seconds
    assert WAKING.wakings(work) == pytest.approx(300 / (1 + 300 * kept))
    assert WAKING.batches(work) == pytest.approx(100 / (1 + 100 * kept) + 200 / (1 + 200 * kept))
    assert WAKING.complete(work)["batches"] == WAKING.batches(work)


def test_the_median_window_is_what_is_measured():
    windows = [each for each in forge() if each.held_out]
    name = windows[0].load.name
    own = [each for each in windows if each.load.name == name]
    odd = msgspec.structs.replace(own[0], values=own[0].values | {"rss": 1e15})
    model = fit_model(forge(), ["rss"])
    (found,) = check(model, [own[0], odd, own[1]], ["rss"], held_out=True)
    assert found.off == pytest.approx(0, abs=1e-6)


def test_over_how_many_workers_a_message_is_heard():
    assert heard_of(2, 1) == 0  # only its own worker would hear it
    assert heard_of(1, 2) == pytest.approx(0.5)  # half of the times the stream is elsewhere
    assert heard_of(2, 2) == pytest.approx(1.25)
    assert heard_of(2, 1_000) == pytest.approx(2, abs=0.01)


def test_heartbeats_are_of_the_silent():
    quiet = Load(streams=1_000, heartbeat=10.0)
    assert heartbeats_of(quiet, 500) == 100
    busy = Load(streams=1_000, heartbeat=10.0, sends=1_000.0)
    assert heartbeats_of(busy, 500) < 1e-3
    seldom = Load(streams=1_000, heartbeat=10.0, sends=0.001)
    assert heartbeats_of(seldom, 500) == pytest.approx(100, rel=0.01)


def test_who_sends_seldom_is_looked_up_each_time():
    assert lookups_of(Load(streams=1_000, sends=1.0), 500) == pytest.approx(1.0, rel=0.05)
    assert lookups_of(Load(streams=1_000, sends=1e6), 500) == pytest.approx(500 / 15, rel=0.01)


def test_a_prediction_is_of_what_was_really_sent():
    point = forge()[4]
    more = type(point)(
        load=point.load, held_out=False, values=point.values | {"sends": 123.0, "streams": 7.0}
    )
    assert (done(more).sends, done(more).streams) == (123.0, 7)
