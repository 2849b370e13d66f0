"""The table of what must be reached: computed, and on the right side of each limit."""

import pytest

from bench.results import Results, Sample
from bench.verdict import verdict

GOOD = {
    ("fanout", "sottovoce", "1000 streams", "events_per_second"): 200_000.0,
    ("fanout", "nchan", "1000 streams", "events_per_second"): 200_000.0,
    ("fanout", "sse-starlette", "1000 streams", "events_per_second"): 40_000.0,
    ("fanout", "write-c", "1000 streams", "events_per_second"): 400_000.0,
    ("idle", "sottovoce", "10000 streams", "rss_kb"): 10.0,
    ("idle", "sottovoce", "1000 streams", "rss_kb"): 10.0,
    ("idle", "sottovoce", "18000 streams", "rss_kb"): 11.0,
    ("idle", "sottovoce", "cost at 1000 streams", "cpu_us_per_event"): 100.0,
    ("idle", "sottovoce", "cost at 18000 streams", "cpu_us_per_event"): 110.0,
    ("idle", "sottovoce", "10000 streams", "quiet_cores"): 0.019,
    ("connect", "sottovoce", "new streams", "streams_per_second"): 5_000.0,
    ("requests", "engine", "64 connections", "posts_per_second"): 40_000.0,
    ("requests", "uvicorn", "64 connections", "posts_per_second"): 40_000.0,
    ("requests", "hypercorn", "64 connections", "posts_per_second"): 5_000.0,
    ("pairs", "sottovoce", "maximum", "sends_per_second"): 6_000.0,
    ("pairs", "sottovoce", "50 % of the maximum", "p50_ms"): 4.9,
    ("pairs", "sottovoce", "50 % of the maximum", "p99_ms"): 29.9,
}
"""Just enough for every line, and for what is hoped for beyond."""


def results(figures: dict[tuple[str, str, str, str], float]) -> Results:
    return Results(
        Sample(scenario=scenario, subject=subject, case=case, values={value: figure})
        for (scenario, subject, case, value), figure in figures.items()
    )


def test_a_run_that_has_it_all_meets_every_line():
    lines = verdict(results(GOOD))
    assert [line.what for line in lines if line.met is not True] == []
    assert [line.hoped for line in lines if "no" in line.hoped] == []


@pytest.mark.parametrize(
    ("figure", "worse", "line"),
    [
        (("fanout", "sottovoce", "1000 streams", "events_per_second"), 199_000.0, 0),
        (("fanout", "sse-starlette", "1000 streams", "events_per_second"), 40_100.0, 1),
        (("idle", "sottovoce", "10000 streams", "rss_kb"), 12.1, 2),
        (("connect", "sottovoce", "new streams", "streams_per_second"), 2_999.0, 3),
        (("requests", "engine", "64 connections", "posts_per_second"), 19_999.0, 4),
        (("requests", "hypercorn", "64 connections", "posts_per_second"), 5_100.0, 5),
        (("pairs", "sottovoce", "maximum", "sends_per_second"), 2_999.0, 6),
        (("pairs", "sottovoce", "50 % of the maximum", "p50_ms"), 5.0, 7),
        (("pairs", "sottovoce", "50 % of the maximum", "p99_ms"), 30.0, 8),
        (("idle", "sottovoce", "cost at 18000 streams", "cpu_us_per_event"), 111.0, 9),
        (("idle", "sottovoce", "18000 streams", "rss_kb"), 11.1, 10),
        (("idle", "sottovoce", "10000 streams", "quiet_cores"), 0.02, 11),
    ],
)
def test_a_figure_on_the_wrong_side_is_short(figure, worse, line):
    lines = verdict(results(GOOD | {figure: worse}))
    assert lines[line].met is False


@pytest.mark.parametrize(
    ("figure", "worse", "line"),
    [
        (("fanout", "write-c", "1000 streams", "events_per_second"), 401_000.0, 0),
        (("idle", "sottovoce", "10000 streams", "rss_kb"), 10.1, 2),
        (("connect", "sottovoce", "new streams", "streams_per_second"), 4_999.0, 3),
        (("requests", "uvicorn", "64 connections", "posts_per_second"), 40_001.0, 4),
        (("pairs", "sottovoce", "maximum", "sends_per_second"), 5_999.0, 6),
    ],
)
def test_what_is_hoped_for_is_judged_by_itself(figure, worse, line):
    found = verdict(results(GOOD | {figure: worse}))[line]
    assert found.met is True
    assert ": no" in found.hoped


@pytest.mark.parametrize("missing", GOOD)
def test_what_was_not_measured_is_not_judged(missing):
    """A line whose figure is not there says so; it is neither met nor short."""
    lines = verdict(results({name: figure for name, figure in GOOD.items() if name != missing}))
    assert all(line.met is not False for line in lines)
    if missing[1] != "write-c" and missing[:3] != ("requests", "uvicorn", "64 connections"):
        assert any(line.met is None or line.hoped == "" for line in lines)


def test_the_median_of_the_rounds_is_judged():
    figure = ("connect", "sottovoce", "new streams")
    rounds = [
        Sample(
            scenario=figure[0],
            subject=figure[1],
            case=figure[2],
            round=number,
            values={"streams_per_second": rate},
        )
        for number, rate in enumerate([100.0, 3_100.0, 9_000.0])
    ]
    (line,) = [line for line in verdict(Results(rounds)) if line.met is not None]
    assert line.reached == "3,100 /s"


def test_two_processes_are_not_judged_as_one():
    twice = Sample(
        scenario="connect",
        subject="sottovoce",
        case="new streams",
        processes=2,
        values={"streams_per_second": 9_000.0},
    )
    assert all(line.met is None for line in verdict(Results([twice])))


def test_sends_on_the_whole_machine_are_those_of_the_better_number_of_workers():
    both = [
        Sample(
            scenario="pairs",
            subject="sottovoce",
            case="maximum",
            processes=processes,
            values={"sends_per_second": rate},
        )
        for processes, rate in ((1, 2_500.0), (2, 3_500.0))
    ]
    (line,) = [line for line in verdict(Results(both)) if line.met is not None]
    assert (line.met, line.reached) == (True, "3,500 /s")
