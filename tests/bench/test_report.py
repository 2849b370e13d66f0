"""The generated parts of docs/performance.md, and nothing else of it."""

from pathlib import Path

import pytest

from bench.report import NoSuchPart, fill, parts
from bench.results import Results, Run, Sample, newest, read_run, write_run

RUN = Run(
    began="2026-01-02T03:04:05Z",
    quick=False,
    rounds=3,
    machine={"cpu": "a fast one", "cores": "2"},
    absent={"nchan": "no nginx"},
    failed=["connect hypercorn: Refused"],
    samples=[
        Sample(
            scenario="fanout",
            subject="sottovoce",
            case="1000 streams",
            round=number,
            values={"events_per_second": rate, "bytes_per_event": 290.0},
        )
        for number, rate in enumerate([30_000.0, 10_000.0, 20_000.0])
    ],
)


def test_a_part_is_replaced_and_what_is_written_by_hand_stays():
    page = "Why.\n<!-- bench: one -->\nold\nolder\n<!-- end -->\nAnd \\1 how.\n"
    filled = fill(page, {"one": r"new \1"})
    assert filled == "Why.\n<!-- bench: one -->\nnew \\1\n<!-- end -->\nAnd \\1 how.\n"


def test_a_page_without_the_part_is_said():
    with pytest.raises(NoSuchPart):
        fill("<!-- bench: one -->\n<!-- end -->", {"two": ""})


def test_the_page_has_a_place_for_every_part():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text("utf-8")
    filled = fill(page, parts(RUN, Results(RUN.samples)))
    assert filled.count("<!-- bench:") == len(parts(RUN, Results(RUN.samples)))
    assert "| **Sottovoce** | 20,000 <sub>10,000–30,000</sub> | 290 |" in filled


def test_what_was_left_out_and_given_up_is_said():
    text = parts(RUN, Results(RUN.samples))["machine"]
    for said in ("a fast one", "nchan in nginx (C) (no nginx)", "connect hypercorn: Refused"):
        assert said in text


def test_a_run_is_kept_and_the_newest_found(tmp_path):
    older = write_run(RUN, tmp_path)
    assert newest(tmp_path) == older
    assert read_run(older) == RUN
    assert newest(tmp_path / "nowhere") is None
