"""`python -m bench run` measures; `python -m bench report` writes docs/performance.md.
`python -m bench capacity` measures what a unit of work costs; `python -m bench plan` uses it.
`python -m bench takeover` measures how long `sottovoce migrate` keeps an application waiting.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import typer
from rich.console import Console
from rich.table import Table

from bench.capacity.command import capacity, capacity_report, plan_command
from bench.client import Refused
from bench.machine import CLIENT_CORE, client_on, describe_machine, raise_file_limit
from bench.report import write_report
from bench.results import Results, Run, Sample, newest, read_run, write_run
from bench.scenarios import Plan, connect, fanout, idle, pairs, requests
from bench.subjects import ROOT, SUBJECTS, WORK
from bench.takeover.command import takeover
from bench.verdict import verdict

SCENARIOS = {module.NAME: module for module in (fanout, pairs, idle, connect, requests)}
RESULTS = WORK / "results"
MEASUREMENT_FAILS = (
    Refused, OSError, psycopg.Error, psutil.Error, subprocess.SubprocessError, AssertionError,
)  # fmt: skip
TABLE_WIDTH = 140
QUIET = 0.1
"""Share of the machine that something else may take before a run is worth a warning."""

cli = typer.Typer(add_completion=False, help=__doc__)
cli.command()(capacity)
cli.command()(capacity_report)
cli.command("plan")(plan_command)
cli.command()(takeover)
console = Console(stderr=True, soft_wrap=True, highlight=False)


@cli.command()
def run(
    scenario: Annotated[str, typer.Option(help="Some of them, by comma.")] = ",".join(SCENARIOS),
    subject: Annotated[str, typer.Option(help="Some of them, by comma.")] = ",".join(SUBJECTS),
    rounds: Annotated[int, typer.Option(min=1, help="Of everything that is repeated.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of one measurement.")] = 1.5,
    quick: Annotated[bool, typer.Option(help="One round, fewer cases: is all in order?")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
) -> None:
    """Measure, print the table of what must be reached, and keep the run as JSON."""
    began = time.monotonic()
    absent, here = {}, []
    for name in _chosen(subject, list(SUBJECTS)):
        missing = SUBJECTS[name].missing()
        if missing:
            absent[name] = missing
            console.print(f"left out: {SUBJECTS[name].label} ({missing})")
        else:
            here.append(name)
    files = raise_file_limit()
    if files < 19_000:
        console.print(f"only {files} open files are allowed: the largest cases will fail")
    others = psutil.cpu_percent(interval=1.0) / 100
    if others > QUIET:
        console.print(f"something else takes {others:.0%} of this machine: the figures suffer")
    failed: list[str] = []
    samples: list[Sample] = []
    plan = Plan(
        subjects=here,
        rounds=1 if quick else rounds,
        seconds=min(seconds, 1.0) if quick else seconds,
        quick=quick,
        say=lambda text: console.print(f"{_clock(began)}  {text}"),
        guard=lambda what, measured: _guarded(what, measured, failed),
    )
    machine = describe_machine() | {"busy with other things": f"{others:.0%}"}
    started = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
    gc.disable()  # the client makes no cycles, and must not stop to look for them
    with client_on([CLIENT_CORE]), _interruptible(failed):
        for name in _chosen(scenario, list(SCENARIOS)):
            for sample in SCENARIOS[name].run(plan):
                samples.append(sample)
                console.print(f"        {_describe(sample)}", style="dim")
    gc.enable()
    path = write_run(
        Run(
            began=started,
            quick=quick,
            rounds=plan.rounds,
            machine=machine,
            absent=absent,
            failed=failed,
            samples=samples,
        ),
        out,
    )
    _print_verdict(Results(samples))
    for failure in failed:
        console.print(f"given up: {failure}", style="red")
    console.print(f"{_clock(began)}  {path}")


@cli.command()
def report(
    results: Annotated[Path, typer.Option(help="A run's JSON, or the folder of runs.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="The folder of performance.md.")] = ROOT / "docs",
) -> None:
    """Fill the generated parts of docs/performance.md from the newest run, and draw its plots."""
    path = newest(results) if results.is_dir() else results
    if path is None:
        console.print(f"no run in {results}: make bench")
        raise typer.Exit(1)
    for written in write_report(read_run(path), docs):
        console.print(str(written))


def _guarded(what: str, measured: Iterator[Sample], failed: list[str]) -> Iterator[Sample]:
    """What cannot be measured is said, and the rest goes on."""
    try:
        yield from measured
    except MEASUREMENT_FAILS as error:
        failed.append(f"{what}: {type(error).__name__} {error}".strip())
        console.print(f"        given up: {failed[-1]}", style="red")


@contextmanager
def _interruptible(failed: list[str]) -> Iterator[None]:
    """Ctrl-C ends the measuring, and keeps what was measured."""
    try:
        yield
    except KeyboardInterrupt:
        failed.append("the rest: interrupted")


def _chosen(text: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of {', '.join(known)}")
    return names


def _describe(sample: Sample) -> str:
    values = ", ".join(f"{name} {value:,.4g}" for name, value in sample.values.items())
    return f"{sample.subject}, {sample.case}: {values}"


def _clock(began: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes:2}:{seconds:02}"


def _print_verdict(results: Results) -> None:
    table = Table("", "what must be reached", "at least", "reached", "reach for")
    for line in verdict(results):
        sign = {True: "[green]ok", False: "[red]short", None: "-"}[line.met]
        table.add_row(sign, line.what, line.least, line.reached or "not measured", line.hoped)
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


if __name__ == "__main__":
    cli()
