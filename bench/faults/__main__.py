"""`python -m bench.faults`: a campaign of so many minutes; exits with 1 at any broken promise."""

import gc
import random
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import trio
import typer
from rich.console import Console

from bench.faults.campaign import run_campaign
from bench.faults.faults import FAULTS
from bench.faults.report import rows, show
from bench.machine import raise_file_limit
from bench.subjects import WORK

LEDGER = "ledger.msgpack"
"""What the clients saw, beside the servers' logs, for whoever looks for the reason."""

console = Console(soft_wrap=True, highlight=False)


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of faults.")] = 10.0,
    seed: Annotated[int | None, typer.Option(help="Of chance; printed.")] = None,
    channels: Annotated[int, typer.Option(min=2)] = 200,
    rate: Annotated[float, typer.Option(min=1.0, help="Sends a second.")] = 120.0,
    only: Annotated[str, typer.Option(help="Faults whose names have this in them.")] = "",
) -> None:
    """Break everything, on purpose, under load; then check the ledger."""
    raise_file_limit()
    # The ledger only grows, and to look through all of it takes up to a second, in which no client
    # is served: what is young is looked through as ever, the rest is not.
    gc.set_threshold(gc.get_threshold()[0], 10, 1_000_000)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    kinds = [kind for kind in FAULTS if only in kind]
    if not kinds:
        raise typer.BadParameter(f"no fault has {only!r} in its name")
    console.print(f"seed {seed}; {len(kinds)} kinds of faults; {minutes:g} minutes")
    WORK.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=WORK))
    outcome = trio.run(
        lambda: run_campaign(
            folder,
            seed=seed,
            seconds=60 * minutes,
            channels=channels,
            rate=rate,
            kinds=kinds,
            say=console.print,
        )
    )
    show(outcome, console)
    slow = not all(row.held for row in rows(outcome))
    if outcome.violations or outcome.defects or outcome.leaks or slow:
        (folder / LEDGER).write_bytes(msgspec.msgpack.encode(outcome.ledger))
        console.print(f"everything is kept in {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
