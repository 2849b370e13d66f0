"""One small measurement of the real server: does what is counted fit together?"""

from pathlib import Path

import pytest

from bench.capacity import measure as measuring
from bench.capacity.meters import Counts
from bench.capacity.pace import PACE, Sampler
from bench.capacity.points import GROUP_STREAMS, Load, Point, Session
from bench.machine import CORES


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.subjects.WORK", Path(tmp_path))
    for name in ("SINGLES", "GROUPS"):
        monkeypatch.setattr(measuring, name, 2)
    monkeypatch.setattr(measuring, "SETTLE_SECONDS", 0.2)


def test_a_window_counts_what_was_done_and_who_used_what():
    load = Load(streams=60, sends=40.0, connects=10.0, heartbeat=1.0)
    session = Session(workers=1, heartbeat=1.0, points=[Point(load=load, held_out=True)])
    stored: list[Counts] = []
    said: list[str] = []
    with Sampler(CORES) as pace:
        measured, *again = measuring.measure(
            [session], seconds=2.0, rounds=1, pace=pace, say=said.append, stored=stored.append
        )
    assert len(again) < measuring.TRIES
    values = measured.values
    for core in CORES:
        assert 20 < values[f"{PACE}{core}"] < 20_000
    assert measured.load == load and measured.held_out
    assert values["lost"] == values["turned away"] == values["ended"] == 0
    assert 60 <= values["streams"] <= 60 + 10 * 4  # those who came stay for two seconds
    assert values["channels"] == 2 + 2 + (60 - 2 - 2 * GROUP_STREAMS) / 2
    assert values["sends"] == pytest.approx(40, rel=0.5)
    assert values["deliveries"] == pytest.approx(2 * values["sends"], rel=0.1)
    assert 3 < values["connects"] < 20
    assert 5 < values["heartbeats"] < 60  # of those that nobody writes to
    assert 0 < values["appends"] <= values["sends"] * 1.1
    assert values["statements"] > values["appends"]
    assert values["redis commands"] > values["sends"]
    assert values["wal bytes"] > 100 * values["sends"]
    for name in ("worker cpu", "postgres cpu", "redis cpu", "client cpu"):
        assert 0 < values[name] < 2, name
    assert 0 < values["p50_ms"] <= values["p99_ms"] <= values["p999_ms"]
    assert values["rss"] > 50e6
    (left,) = stored
    assert left["message_row"] > 100 and left["audit_row"] > 50
    assert left["redis_message"] > 100
    assert any("60 streams" in line for line in said)


class Scripted:
    """A pace that is known beforehand; the last one stays."""

    def __init__(self, *paces: float) -> None:
        self._paces = list(paces)

    def between(self, began: float, ended: float) -> dict[str, float]:
        assert began < ended
        return {f"{PACE}0": self._paces.pop(0) if len(self._paces) > 1 else self._paces[0]}


def test_while_the_machine_is_slow_a_load_is_measured_again(monkeypatch):
    monkeypatch.setattr(measuring, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(measuring, "LOOKS", 2)
    loads = [Load(streams=40, sends=20.0), Load(streams=40), Load(streams=40, sends=40.0)]
    session = Session(workers=1, heartbeat=15.0, points=[Point(load=load) for load in loads])
    pace = Scripted(300.0, 310.0, 400.0, 305.0, 400.0, 500.0)  # slow, well; slow; slow, ...
    said: list[str] = []
    measured = list(
        measuring.measure(
            [session], seconds=0.4, rounds=1, pace=pace, say=said.append, stored=lambda _: None
        )
    )
    tried = [each.load for each in measured]
    assert tried == [loads[0]] * 2 + [loads[1]] + [loads[2]] * measuring.TRIES
    assert sum("slow" in line for line in said) == 1 + 1 + measuring.TRIES
    assert all(each.values["sends"] > 0 for each in measured if each.load.sends)
