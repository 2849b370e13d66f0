"""`python -m bench capacity` and `python -m bench plan`."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.capacity.calibration import (
    Calibration,
    read_calibration,
    storage_of,
    write_calibration,
)
from bench.capacity.fault import run_fault
from bench.capacity.measure import measure, sessions_seconds
from bench.capacity.meters import Counts
from bench.capacity.model import fit_model
from bench.capacity.objectives import read_objectives
from bench.capacity.pace import Sampler, calm
from bench.capacity.plan import Deployment, Unplannable, plan
from bench.capacity.points import FULL, QUICK, Measured
from bench.capacity.search import Step, search
from bench.capacity.show import WITHIN, held_out, print_calibration, print_plan
from bench.machine import CLIENT_CORE, CORES, client_on, describe_machine, raise_file_limit
from bench.subjects import ROOT, WORK

DOCS = ROOT / "docs"
FIT = "capacity.json"
SEARCH_STREAMS = 5_000
SEARCH_SECONDS = 4.0
SEARCH_TAKES = 62.0
"""Seconds, about."""
FAULT_TAKES = 42.0
QUICK_SECONDS, QUICK_ROUNDS = 2.0, 2
"""Just enough windows for as many costs."""
MEASURED = "capacity-measured.json"
"""What was measured, before anything is made of it."""
NOT_OF_IT = ("node", "nginx", "nchan", "gcc", "uvicorn", "uvloop", "starlette", "sse-starlette")
"""Of what describes the machine: the peers'."""

console = Console(stderr=True, soft_wrap=True, highlight=False)


def capacity(
    quick: Annotated[
        bool, typer.Option(help="Three minutes: does it work? The docs stay as they are.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of one window, unless quick.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of everything, unless quick.")] = 3,
    docs: Annotated[Path, typer.Option(help="The folder of capacity.md.")] = DOCS,
) -> None:
    """Measure this machine, fit what each unit of work costs, and write docs/capacity.md anew.

    About half an hour, longer on a machine that others slow down, and nothing else should run
    meanwhile. Ends with 1 where a held-out load is not predicted within 15 %: too little to plan
    by. Quick ones are not asked.
    """
    sessions = QUICK if quick else FULL
    if raise_file_limit() < 19_900:
        console.print(
            "fewer than 19,900 open files are allowed: ulimit -n, or the most streams fail"
        )
    others = psutil.cpu_percent(interval=1.0) / 100
    if others > 0.1:
        console.print(f"something else takes {others:.0%} of this machine: the figures suffer")
    began = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
    machine = describe_machine() | {"busy with other things": f"{others:.0%}"}
    measured: list[Measured] = []
    stored: list[Counts] = []
    steps: list[Step] = []
    fault = None
    if quick:
        seconds, rounds = QUICK_SECONDS, QUICK_ROUNDS
    expected = sessions_seconds(sessions, seconds=seconds, rounds=rounds)
    if not quick:
        expected += 2 * SEARCH_TAKES + FAULT_TAKES
    gc.disable()  # the client makes no cycles, and must not stop to look for them
    with _progress(expected) as say:
        with client_on([CLIENT_CORE]), Sampler([*CORES[:2], CLIENT_CORE]) as pace:
            measured += measure(
                sessions, seconds=seconds, rounds=rounds, pace=pace, say=say, stored=stored.append
            )
        objectives = read_objectives()
        if not quick:
            for workers in (1, 2):
                steps += search(
                    workers,
                    SEARCH_STREAMS,
                    seconds=SEARCH_SECONDS,
                    objectives=objectives,
                    say=say,
                )
            fault = run_fault(say)
        (WORK / MEASURED).write_bytes(msgspec.json.encode({"windows": measured, "stored": stored}))
        say("fitting")
        calibration = Calibration(
            began=began,
            quick=quick,
            seconds=seconds,
            rounds=rounds,
            machine={name: fact for name, fact in machine.items() if name not in NOT_OF_IT},
            objectives=objectives,
            measured=measured,
            steps=steps,
            fault=fault,
            storage=storage_of(measured, stored),
            model=fit_model(calm(measured)),
        )
    gc.enable()
    path = WORK / FIT if quick else docs / FIT
    write_calibration(calibration, path)
    print_calibration(calibration)
    console.print(str(path))
    if not quick:
        _write_docs(calibration, docs)
        if missed := [each for each in held_out(calibration) if abs(each.off) > WITHIN]:
            for each in missed:
                console.print(f"{each.load.name}: {each.quantity} is off by {each.off:+.0%}")
            raise typer.Exit(1)


def capacity_report(
    fit: Annotated[Path, typer.Option(help="A run's JSON.")] = DOCS / FIT,
    docs: Annotated[Path, typer.Option(help="The folder of capacity.md.")] = DOCS,
) -> None:
    """Fit the measured points of a run again, and write docs/capacity.md from it."""
    calibration = _read(fit)
    calibration = msgspec.structs.replace(calibration, model=fit_model(calm(calibration.measured)))
    if fit.parent == docs:
        write_calibration(calibration, fit)
    print_calibration(calibration)
    _write_docs(calibration, docs)


def plan_command(
    clients: Annotated[int, typer.Option(help="Streams open at the busiest moment.")],
    sends_per_second: Annotated[float, typer.Option(help="Messages, then.")],
    reconnect_within: Annotated[
        float, typer.Option(help="Seconds in which the clients of a dead node come back.")
    ] = 60.0,
    cores: Annotated[int, typer.Option(help="Of a node, each with a worker.")] = 8,
    memory_gb: Annotated[float, typer.Option(help="Of a node.")] = 32.0,
    fanout: Annotated[int, typer.Option(help="Streams that hear of a message.")] = 2,
    heartbeat: Annotated[float, typer.Option(help="SOTTOVOCE_HEARTBEAT_SECONDS.")] = 15.0,
    stay_seconds: Annotated[
        float, typer.Option(help="A stream's life: the token's rest and the session's lease.")
    ] = 315.0,
    characters: Annotated[int, typer.Option(help="Of a message.")] = 100,
    mean_share: Annotated[
        float, typer.Option(help="Of the busiest rates, over the whole year.")
    ] = 0.3,
    fit: Annotated[Path, typer.Option(help="The JSON of your own bench capacity.")] = DOCS / FIT,
) -> None:
    """What to buy for so many clients and messages, from what this code was measured to need."""
    calibration = _read(fit)
    try:
        deployment = Deployment(
            clients=clients,
            sends_per_second=sends_per_second,
            reconnect_within=reconnect_within,
            cores=cores,
            memory_gb=memory_gb,
            fanout=fanout,
            heartbeat=heartbeat,
            stay_seconds=stay_seconds,
            characters=characters,
            mean_share=mean_share,
        )
        answer = plan(calibration.model, calibration.storage, deployment, known=calibration.known)
    except Unplannable as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    print_plan(answer, calibration)


def _write_docs(calibration: Calibration, docs: Path) -> None:
    from bench.capacity.report import write_report  # matplotlib: not for those who only plan

    for written in write_report(calibration, docs):
        console.print(str(written))


def _read(path: Path) -> Calibration:
    try:
        return read_calibration(path)
    except OSError:
        console.print(f"no {path}: python -m bench capacity")
    except msgspec.MsgspecError:
        console.print(f"{path} is no run of bench capacity")
    raise typer.Exit(1)


@contextmanager
def _progress(expected: float) -> Iterator[Callable[[str], None]]:
    """What is being done, beside a bar that moves with time; a line each where no terminal is.

    Args:
        expected: seconds.
    """
    began = time.monotonic()
    progress = Progress(
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn(f"of about {expected / 60:.0f} minutes  {{task.description}}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task("", total=expected)

    def say(text: str) -> None:
        spent = time.monotonic() - began
        progress.update(task, completed=spent, description=text)
        if not console.is_terminal:
            console.print(f"{int(spent) // 60:2}:{int(spent) % 60:02}  {text}")

    with progress:
        yield say
