"""`python -m loadtest.mutants`: does a load test notice a server that breaks its promises?

Into a copy of the sources a bug is put - one frame in ten thousand is dropped, or delivered
twice - and `python -m loadtest run` on that copy must end with 1 and name it. A text that is not
there any more is an error: it says nothing of what a load test sees.
"""

import json
import os
import subprocess
import sys
import time
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from bench.sources import Broken, Patch, copied
from loadtest.local import ROOT

PACKAGES = ("protocol", "storage", "server", "bench", "loadtest")
WORK = ROOT / ".load"
RUN_SECONDS = 600.0
"""For one run of two minutes, all told."""
HEARTBEAT_SECONDS = 3.0
"""Silence must be noticed within the run."""

console = Console(soft_wrap=True, highlight=False)


class Mutant(NamedTuple):
    """A server with a bug. EVERY in its texts stands for one in how many.

    Attributes:
        names: figures of which at least one must be missed.
    """

    patches: tuple[Patch, ...]
    names: tuple[str, ...]

    def one_in(self, every: int) -> list[Patch]:
        return [each._replace(new=each.new.replace("EVERY", str(every))) for each in self.patches]


CONNECTION = "server/live/connection.py"
_COUNT = Patch(
    CONNECTION,
    "_HEARTBEAT_CHUNK = chunk(HEARTBEAT_EVENT)\n",
    "_HEARTBEAT_CHUNK = chunk(HEARTBEAT_EVENT)\n_offered = iter(range(1, 10**15))\n",
)
_WRITE = """\
            if not wire.write(due.chunked if wire.chunked else due.plain):
                self._start_work()
"""

MUTANTS = {
    # The watermark has moved by then: the server believes that the stream has it.
    "one frame in EVERY is dropped": Mutant(
        (
            _COUNT,
            Patch(
                CONNECTION,
                _WRITE,
                "            if next(_offered) % EVERY == 0:\n                return\n" + _WRITE,
            ),
        ),
        names=("delivery_percent", "gaps"),
    ),
    "one frame in EVERY is delivered twice": Mutant(
        (
            _COUNT,
            Patch(
                CONNECTION,
                _WRITE,
                "            if next(_offered) % EVERY == 0:\n"
                "                wire.write(due.chunked if wire.chunked else due.plain)\n" + _WRITE,
            ),
        ),
        names=("duplicates",),
    ),
    "no heartbeat is written": Mutant(
        (
            Patch(
                CONNECTION,
                "            if not wire.write(_HEARTBEAT_CHUNK if wire.chunked else "
                "HEARTBEAT_EVENT):\n                self._start_work()\n",
                "",
            ),
        ),
        names=("lost_heartbeats",),
    ),
}


def main(
    name: Annotated[str, typer.Argument(help="Mutants whose names have this in them.")] = "",
    every: Annotated[int, typer.Option(min=2, help="One frame in how many.")] = 10_000,
    minutes: Annotated[float, typer.Option(min=0.05, help="Of each run.")] = 2.0,
) -> None:
    """Put each bug in, and see whether the load test ends with 1 and names it."""
    table = Table(title="mutants", title_justify="left")
    for column in ("", "the bug", "missed", "deliveries", "seconds"):
        table.add_column(column)
    survived = 0
    for bug, mutant in MUTANTS.items():
        if name not in bug:
            continue
        began = time.monotonic()
        code, missed, deliveries = run_mutant(
            mutant, every=every, arguments=["--minutes", str(minutes)]
        )
        caught = code == 1 and any(figure in missed for figure in mutant.names)
        survived += not caught
        table.add_row(
            "caught" if caught else "SURVIVED",
            bug.replace("EVERY", f"{every:,}"),
            ", ".join(f"{figure} {value:,.6g}" for figure, value in missed.items()) or "nothing",
            f"{deliveries:,.0f}",
            f"{time.monotonic() - began:.0f}",
        )
    console.print(table)
    if survived:
        raise typer.Exit(1)


def run_mutant(
    mutant: Mutant, *, every: int, arguments: list[str]
) -> tuple[int, dict[str, float], float]:
    """A run over a copy of the sources.

    Args:
        arguments: of `python -m loadtest run hold`.

    Returns:
        Its exit code, the figures whose objectives it missed, and how many deliveries it saw.

    Raises:
        Broken
    """
    with copied(PACKAGES, mutant.one_in(every), work=WORK) as root:
        command = [sys.executable, "-m", "loadtest", "run", "hold", *arguments]
        command += ["--heartbeat-seconds", str(HEARTBEAT_SECONDS)]
        try:
            ran = subprocess.run(
                command,
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
            told = json.loads((root / ".load" / "hold.json").read_text())
        except subprocess.TimeoutExpired:
            raise Broken("the run did not end") from None
        except (OSError, ValueError):
            raise Broken(f"the run failed:\n{ran.stdout[-3000:]}") from None
    missed = {
        each["objective"].split()[0]: each["value"]
        for each in told["objectives"]
        if not each["met"]
    }
    return ran.returncode, missed, told["figures"]["deliveries"]


if __name__ == "__main__":
    typer.run(main)
