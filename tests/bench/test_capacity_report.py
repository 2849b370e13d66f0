"""What is made of a run: the page's parts, its charts, the plan's table, and the JSON."""

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from bench.__main__ import cli
from bench.capacity.calibration import read_calibration, storage_of, write_calibration
from bench.capacity.objectives import read_objectives
from bench.capacity.report import DEPLOYMENTS, command_of, parts, write_report
from bench.capacity.search import FIRST, MOST, Step, climb, highest
from bench.capacity.show import held_out, verdict_rows
from bench.report import fill
from tests.bench.forged import forge_calibration

DOCS = Path(__file__).parents[2] / "docs"
CALIBRATION = forge_calibration()


def test_the_page_has_a_place_for_every_part_and_they_are_filled(tmp_path):
    page = (DOCS / "capacity.md").read_text("utf-8")
    made = parts(CALIBRATION)
    filled = fill(page, made)
    assert filled.count("<!-- bench:") == len(made)
    assert "a fast one" in filled
    for text in made.values():
        assert text in filled


def test_the_page_names_the_commands_of_its_deployments():
    page = (DOCS / "capacity.md").read_text("utf-8")
    assert DEPLOYMENTS["large"].clients == 1_000_000
    for deployment in DEPLOYMENTS.values():
        assert command_of(deployment) in page


def test_charts_are_drawn_and_are_on_the_page(tmp_path):
    (tmp_path / "capacity.md").write_text((DOCS / "capacity.md").read_text("utf-8"))
    written = write_report(CALIBRATION, tmp_path)
    charts = {path.name: path.read_bytes() for path in written if path.suffix == ".png"}
    assert charts.keys() == {
        "capacity-memory.png",
        "capacity-knee.png",
        "capacity-fault.png",
        "capacity-predicted.png",
    }
    page = (DOCS / "capacity.md").read_text("utf-8")
    for name in charts:
        assert f"plots/{name}" in page


def test_a_run_is_kept_as_it_was(tmp_path):
    path = tmp_path / "capacity.json"
    write_calibration(CALIBRATION, path)
    assert read_calibration(path) == CALIBRATION


def test_the_committed_run_is_one_and_names_no_place_on_this_machine():
    text = (DOCS / "capacity.json").read_text("utf-8")
    calibration = read_calibration(DOCS / "capacity.json")
    assert not calibration.quick
    assert held_out(calibration)
    for word in ("/home", "/tmp", "/work", "/root", "password", "Bearer"):
        assert word not in text


def test_the_verdict_counts_what_is_within():
    (line,) = [row for row in verdict_rows(CALIBRATION) if row[0] == "worker cpu"]
    off = [abs(each.off) for each in held_out(CALIBRATION) if each.quantity == "worker cpu"]
    assert line[1] == f"{sum(each <= 0.15 for each in off)} of {len(off)}"


def test_the_highest_load_is_below_the_first_that_failed():
    assert highest(CALIBRATION.steps, 1, 5_000) == 1_500
    lucky = msgspec.structs.replace(CALIBRATION.steps[0], sends=4_000.0)  # past one that failed
    assert highest([*CALIBRATION.steps, lucky], 1, 5_000) == 1_500
    assert highest(CALIBRATION.steps, 1, 4_000) == 0


@pytest.mark.parametrize("most", [130.0, 700.0, 3_333.0, 16_500.0])
def test_the_climb_comes_within_an_eighth_of_what_can_be_had(most):
    def attempt(sends: float) -> Step:
        missed = ["too much"] if sends > most else []
        return Step(workers=1, streams=9, sends=sends, values={}, missed=missed)

    found = highest(list(climb(attempt)), 1, 9)
    assert found <= most
    assert found >= most - max(most, FIRST) / 8


def test_the_climb_ends_though_nothing_fails():
    steps = list(climb(lambda sends: Step(workers=1, streams=9, sends=sends, values={}, missed=[])))
    assert highest(steps, 1, 9) == steps[-1].sends <= MOST


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"lost": 0.00001}, ["0.001% not delivered"]),
        ({"p99_ms": 251.0}, ["p99 251 ms"]),
        ({"sends": 900.0}, ["900 sends/s of 1,000"]),
        ({"turned away": 0.002}, ["0.20% turned away"]),
        ({"ended": 1.0}, ["1 streams ended"]),
    ],
)
def test_each_objective_can_be_missed(values, said):
    good = {"lost": 0.0, "p99_ms": 20.0, "sends": 1_000.0, "turned away": 0.0, "ended": 0.0}
    assert read_objectives().missed(good | values, 1_000.0) == said


def test_a_plan_says_everything_that_was_asked(tmp_path):
    path = tmp_path / "fit.json"
    write_calibration(CALIBRATION, path)
    arguments = ["plan", "--clients", "200000", "--sends-per-second", "5000"]
    arguments += ["--reconnect-within", "60", "--cores", "8", "--memory-gb", "32"]
    result = CliRunner().invoke(cli, [*arguments, "--fit", str(path)])
    assert result.exit_code == 0, result.output
    for word in (
        "nodes", "workers", "a node dies", "commands", "bandwidth", "memory", "shard", "commits",
        "WAL", "storage a year", "connections", "ports", "files", "full first", "headroom",
        "extrapolated",
    ):  # fmt: skip
        assert word in result.output, word


def test_a_plan_of_nonsense_ends_with_its_name(tmp_path):
    path = tmp_path / "fit.json"
    write_calibration(CALIBRATION, path)
    arguments = ["plan", "--clients", "0", "--sends-per-second", "1", "--fit", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "clients is 0" in result.stderr


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"began": 1}'])
def test_what_is_no_run_is_said(tmp_path, content):
    path = tmp_path / "fit.json"
    if content is not None:
        path.write_bytes(content)
    arguments = ["plan", "--clients", "10", "--sends-per-second", "1", "--fit", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "bench capacity" in result.stderr.replace("\n", " ")


def test_storage_is_that_of_the_session_that_sent_most():
    counts = {
        "characters": 100.0,
        "message_row": 400.0,
        "audit_row": 200.0,
        "redis_message": 300.0,
        "redis_channel": 90.0,
        "messages": 10.0,
    }
    first, second = (
        msgspec.structs.replace(
            each, values=each.values | {"redis memory": memory, "channels": channels}
        )
        for each, memory, channels in zip(
            CALIBRATION.measured, (1_000.0, 21_000.0), (0.0, 100.0), strict=False
        )
    )
    storage = storage_of([first, second], [counts, counts | {"messages": 99.0, "audit_row": 7.0}])
    assert storage.audit_row == 7.0
    assert storage.redis_subscription == 200.0
