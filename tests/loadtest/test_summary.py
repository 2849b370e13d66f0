"""The summary fits on a screen and names what was missed; the charts say what they show."""

from io import StringIO

import pytest
from rich.console import Console

from loadtest import charts, summary
from loadtest.course import Mark, Row
from loadtest.objectives import FILE, judge, read_objectives

FIGURES = {
    "seconds": 120.0, "streams_open_most": 1000, "connects": 1010, "reconnects": 10, "sends": 70000,
    "deliveries": 140000, "expected": 139990, "lost": 14, "delivery_percent": 99.99, "gaps": 14,
    "duplicates": 0, "reorderings": 0, "leaks": 0, "lost_heartbeats": 0, "delivery_p50_ms": 3,
    "delivery_p99_ms": 900, "delivery_p999_ms": 1200, "delivery_max_ms": 1300,
    "connect_failures_percent": 0.0, "send_failures_percent": 0.0,
    "generator_cpu_percent": 97.0, "generator_lag_p99_ms": 8.0,
}  # fmt: skip


def told(figures: dict[str, float]) -> str:
    console = Console(width=summary.WIDTH, file=StringIO(), record=True)
    console.print(summary.render("hold", figures, judge(read_objectives(FILE, "hold"), figures)))
    return console.export_text()


def test_it_fits_on_a_screen_and_names_what_was_missed():
    text = told(FIGURES)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    for missed in ("delivery_percent >= 100: it was 99.99", "gaps <= 0: it was 14"):
        assert f"MISSED  {missed}" in text
    assert "THE GENERATOR WAS THE LIMIT: it took 97 % of a core" in text
    assert "7 of 10 objectives met" in text


def test_a_generator_with_room_is_not_blamed():
    assert "GENERATOR" not in told(FIGURES | {"generator_cpu_percent": 30.0})


def test_a_chart_has_a_finding_units_and_marks():
    rows = [
        Row(float(at), 100, 100, 50.0, 100.0, 100.0 if at != 3 else None, 3.0, 9.0, 20.0, 1.0)
        for at in range(10)
    ]
    drawn = charts.draw(charts.charts_of(rows, FIGURES), [Mark(5.0, "Redis <killed>")])
    assert drawn.count("<svg") == 5
    assert "900 ms or less for 99 % of the deliveries" in drawn
    assert "14 of 139,990 deliveries that were owed were not made" in drawn
    assert drawn.count("seconds</text>") == 5
    assert drawn.count("Redis &lt;killed&gt;") == 5


@pytest.mark.parametrize(
    ("least", "most", "shown"),
    [
        (0.0, 100.0, [0, 25, 50, 75, 100]),
        (0.0, 79.0, [0, 20, 40, 60, 80]),
        (0.0, 0.3, [0, 0.25, 0.5]),
        (99.0, 100.0, [99, 99.25, 99.5, 99.75, 100]),
    ],
)
def test_an_axis_has_round_numbers(least: float, most: float, shown: list[float]):
    assert charts.ticks(least, most) == shown


def test_an_empty_run_has_no_charts():
    assert charts.draw(charts.charts_of([], {}), []) == ""
