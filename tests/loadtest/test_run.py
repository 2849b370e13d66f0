"""Real runs of a few seconds: Locust in processes of its own, for it patches what it touches."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from loadtest.local import ROOT
from loadtest.mutants import MUTANTS, run_mutant

BRIEF = [
    "--users", "20", "--spawn-rate", "20", "--sends-per-second", "40", "--settle-seconds", "1",
]  # fmt: skip
RUN_SECONDS = 60


def test_a_small_run_meets_its_objectives_and_leaves_its_reports(tmp_path: Path):
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "run", "hold"),
            *("--minutes", "0.05", "--out", str(tmp_path), *BRIEF),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "10 of 10 objectives met" in ran.stdout
    figures = json.loads((tmp_path / "hold.json").read_text())["figures"]
    assert figures["streams_open_most"] == 20
    assert figures["expected"] >= figures["sends"] > 20
    with (tmp_path / "hold_stats.csv").open() as file:
        names = {row["Name"]: row for row in csv.DictReader(file)}
    assert int(names["delivery"]["Request Count"]) > 40
    assert names["streams open (count)"]["Max Response Time"] == "20"
    report = (tmp_path / "hold.html").read_text()
    assert "Streams and deliveries" in report
    assert "<svg" in report


def test_a_frame_that_is_delivered_twice_fails_a_run_of_two_workers():
    code, missed, deliveries = run_mutant(
        MUTANTS["one frame in EVERY is delivered twice"],
        every=10,
        arguments=["--minutes", "0.05", "--processes", "2", *BRIEF],
    )
    assert code == 1
    assert list(missed) == ["duplicates"]
    assert missed["duplicates"] > deliveries / 20
