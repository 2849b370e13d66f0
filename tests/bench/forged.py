"""Measurements of a machine whose costs are known, because they were made up."""

import random

import msgspec

from bench.capacity.calibration import Calibration
from bench.capacity.fault import Fault
from bench.capacity.model import UNITS, Waking, fit_model, work_of
from bench.capacity.objectives import read_objectives
from bench.capacity.plan import Storage
from bench.capacity.points import FULL, Measured
from bench.capacity.search import Step

WAKING = Waking(kept_seconds=0.002, connects=2.0)
COSTS: dict[str, dict[str, float]] = {
    "worker cpu": {
        "workers": 0.004, "streams": 1e-6, "heartbeats": 15e-6, "deliveries": 10e-6,
        "sends": 150e-6, "lookups": 80e-6, "heard": 70e-6, "connects": 400e-6, "wakings": 900e-6,
    },
    "postgres cpu": {"services": 0.001, "workers": 0.001, "sends": 150e-6, "batches": 400e-6},
    "redis cpu": {"services": 0.002, "sends": 20e-6, "wakings": 100e-6},
    "rss": {"workers": 80e6, "streams": 11e3, "most connects": 30e3},
    "kernel": {"streams": 9e3},
    "statements": {"workers": 0.6, "lookups": 0.5, "connects": 1.0, "batches": 1.0},
    "redis commands": {"workers": 1.5, "sends": 4.0, "heard": 1.0, "connects": 4.0},
    "redis bytes in": {"workers": 300.0, "sends": 500.0, "sent characters": 1.0},
    "redis bytes out": {"workers": 300.0, "heard": 250.0, "heard characters": 1.0},
    "wal bytes": {"sends": 1_000.0, "sent characters": 1.2},
    "stream bytes": {"heartbeats": 50.0, "deliveries": 200.0, "delivered characters": 1.0},
}  # fmt: skip
STORAGE = Storage(
    characters=100.0,
    message_row=450.0,
    audit_row=250.0,
    redis_message=400.0,
    redis_channel=150.0,
    redis_subscription=200.0,
)


def forge(*, noise: float = 0.0, seed: int = 1) -> list[Measured]:
    """Every point of the full run, twice, each value off by `noise` (one standard deviation)."""
    chance = random.Random(seed)
    measured = []
    for session in FULL:
        for point in [*session.points, *session.points]:
            load = point.load
            talking = {1: 500.0, 6: 100.0}.get(load.fanout, max(0, load.streams - 1_100) / 2)
            work = WAKING.complete(work_of(load, talking, crowded=load.workers > 1))
            values = {
                quantity: sum(cost * work[term] for term, cost in costs.items())
                * chance.gauss(1.0, noise)
                for quantity, costs in COSTS.items()
            }
            values |= {
                "sends": load.sends,
                "connects": load.connects,
                "heartbeats": work["heartbeats"],
                "streams": float(load.streams),
                "talking": talking,
                "most connects": load.connects,
                "p50_ms": 3.0,
                "p99_ms": 9.0,
                "lost": 0.0,
                "turned away": 0.0,
                "ended": 0.0,
                "crowded": float(load.workers > 1),
                "pace of core 0": 300.0,
            }
            measured.append(Measured(load=load, held_out=point.held_out, values=values))
    assert COSTS.keys() == UNITS.keys()
    return measured


def forge_calibration(*, noise: float = 0.05) -> Calibration:
    measured = forge(noise=noise)
    steps = [
        Step(
            workers=workers,
            streams=5_000,
            sends=sends,
            values={
                "sends": sends,
                "p50_ms": 3.0,
                "p99_ms": 9.0 if sends < 2_000 else 900.0,
                "worker cpu": 0.9,
                "postgres cpu": 0.4,
                "client cpu": 0.2,
            },
            missed=[] if sends < 2_000 else ["p99 900 ms"],
        )
        for workers in (1, 2)
        for sends in (250.0, 500.0, 1_000.0, 2_000.0, 1_500.0)
    ]
    fault = Fault(
        workers=2,
        streams=2_000,
        sends=400.0,
        bucket_seconds=0.25,
        killed=10.0,
        back=20.0,
        delivered=[200] * 120,
        p99_ms=[8.0] * 40 + [300.0] * 40 + [8.0] * 40,
        expected=24_000,
        received=24_000,
    )
    return Calibration(
        began="2026-01-02T03:04:05Z",
        quick=False,
        seconds=3.5,
        rounds=2,
        machine={"cpu": "a fast one", "cores": "2"},
        objectives=read_objectives(),
        measured=measured,
        steps=steps,
        fault=fault,
        storage=STORAGE,
        model=fit_model(measured),
    )


def with_costs(calibration: Calibration, quantity: str, factor: float) -> Calibration:
    """The same machine, where all of this costs so many times as much."""
    fit = calibration.model.fits[quantity]
    dearer = msgspec.structs.replace(fit, costs=[cost * factor for cost in fit.costs])
    model = msgspec.structs.replace(
        calibration.model, fits=calibration.model.fits | {quantity: dearer}
    )
    return msgspec.structs.replace(calibration, model=model)
