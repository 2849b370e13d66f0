"""Which windows count, where others slow the machine down."""

import random
import time

import msgspec

from bench.capacity.model import fit_model
from bench.capacity.pace import CALM, LEAST_CALM, PACE, Sampler, calm, slowness
from bench.capacity.points import Load, Measured
from bench.machine import CORES
from tests.bench.forged import forge


def window(load: Load, *paces: float) -> Measured:
    values = {f"{PACE}{core}": pace for core, pace in enumerate(paces)}
    return Measured(load=load, held_out=False, values=values)


def test_the_slowest_core_counts_against_what_it_can_do_itself():
    others = [{f"{PACE}0": 100.0, f"{PACE}1": 200.0}] * 5
    assert slowness({f"{PACE}0": 100.0, f"{PACE}1": 300.0}, others) == 1.5
    assert slowness({f"{PACE}0": 110.0, f"{PACE}1": 200.0}, others) == 1.1


def test_of_each_load_the_calm_windows_count_or_else_the_calmest():
    one, two = Load(sends=1.0), Load(sends=2.0)
    windows = [window(one, pace, 100.0) for pace in (100.0, 100 * CALM - 1, 150.0, 101.0)]
    windows += [window(two, 100.0, pace) for pace in (190.0, 150.0, 170.0, 160.0)]
    kept = calm(windows)
    assert [each for each in kept if each.load == one] == [windows[0], windows[1], windows[3]]
    assert [each for each in kept if each.load == two] == [windows[5], windows[7]]
    assert LEAST_CALM == 2


def test_what_others_took_has_no_part_in_the_fit():
    true = forge()
    chance = random.Random(1)
    spoilt = [
        msgspec.structs.replace(
            each,
            values={name: value * 1.6 for name, value in each.values.items()}
            | {f"{PACE}0": 300.0 * chance.uniform(1.3, 1.6)},
        )
        for each in forge()
    ]
    assert calm([*spoilt, *true]) == true
    quantities = ["worker cpu", "rss"]
    assert fit_model(calm([*spoilt, *true]), quantities) == fit_model(true, quantities)


def test_the_pace_of_each_core_is_told():
    with Sampler(CORES) as pace:
        time.sleep(1.0)
        began = time.perf_counter()
        time.sleep(0.5)
        found = pace.between(began, time.perf_counter())
    assert set(found) == {f"{PACE}{core}" for core in CORES}
    assert all(20 < each < 20_000 for each in found.values())
