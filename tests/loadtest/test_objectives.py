"""A run is judged by its figures, and the generator's faults are not the server's."""

import pytest

from loadtest.objectives import FILE, Objective, judge, read_objectives

GOOD = {
    "delivery_percent": 100.0, "deliveries": 5000, "delivery_p99_ms": 20.0,
    "connect_failures_percent": 0.0, "send_failures_percent": 0.0, "duplicates": 0, "gaps": 0,
    "reorderings": 0, "leaks": 0, "lost_heartbeats": 0, "generator_cpu_percent": 20.0,
    "generator_lag_p99_ms": 3.0,
}  # fmt: skip


def test_a_good_run_meets_all_of_them():
    verdict = judge(read_objectives(FILE, "hold"), GOOD)
    assert verdict.missed == []
    assert len(verdict.judged) == 10
    assert verdict.exit_code == 0


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("delivery_percent", 99.99),
        ("deliveries", 0),
        ("delivery_p99_ms", 251.0),
        ("connect_failures_percent", 0.11),
        ("send_failures_percent", 0.11),
        ("duplicates", 1),
        ("gaps", 1),
        ("reorderings", 1),
        ("leaks", 1),
        ("lost_heartbeats", 1),
    ],
)
def test_each_of_them_can_be_missed(figure: str, value: float):
    verdict = judge(read_objectives(FILE, "hold"), GOOD | {figure: value})
    assert [each.objective.figure for each in verdict.missed] == [figure]
    assert verdict.exit_code == 1


def test_what_was_not_measured_is_missed():
    unmeasured = {name: value for name, value in GOOD.items() if name != "delivery_p99_ms"}
    verdict = judge(read_objectives(FILE, "hold"), unmeasured)
    assert [each.value for each in verdict.missed] == [None]
    assert verdict.exit_code == 1


@pytest.mark.parametrize("tired", [{"generator_cpu_percent": 95.0}, {"generator_lag_p99_ms": 60.0}])
def test_a_tired_generator_is_blamed_for_times_and_for_nothing_else(tired: dict[str, float]):
    late = judge(read_objectives(FILE, "hold"), GOOD | tired | {"delivery_p99_ms": 900.0})
    assert late.generator
    assert late.blamed == []
    assert late.exit_code == 3
    twice = judge(read_objectives(FILE, "hold"), GOOD | tired | {"duplicates": 1})
    assert twice.exit_code == 1
    well = judge(read_objectives(FILE, "hold"), GOOD | tired)
    assert well.exit_code == 0
    assert well.generator


def test_a_scenario_has_its_own():
    of_herd = {each.figure: each for each in read_objectives(FILE, "herd")}
    assert of_herd["delivery_p99_ms"] == Objective("delivery_p99_ms", False, 1000.0)
    assert of_herd["duplicates"].limit == 0


def test_a_limit_is_a_number(tmp_path):
    file = tmp_path / "objectives.toml"
    file.write_text('[at_most]\ngaps = "none"\n')
    with pytest.raises(ValueError, match="number"):
        read_objectives(file, "hold")
