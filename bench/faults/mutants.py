"""`python -m bench.faults.mutants`: campaigns over servers that lack one of their safeguards.

A campaign that finds nothing may be blind. So each safeguard is taken out of a copy of the
sources, and a short campaign over that copy must find violations. A mutant is a few textual
replacements; one whose text is not there any more is an error, and so is one that breaks the
campaign itself: neither says anything of what the campaign sees.
"""

import re
import subprocess
import sys
import time
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from bench.sources import Broken, Patch, copied
from bench.subjects import WORK

PACKAGES = ("protocol", "storage", "server", "bench")
RUN_SECONDS = 150.0
"""For one campaign, all told; on a free machine it takes half of that."""
MINUTES = 0.75
SEED = 5

console = Console(soft_wrap=True, highlight=False)


class Mutant(NamedTuple):
    """A server without one safeguard.

    Attributes:
        only: faults whose names have this in them: those that the safeguard is there for.
    """

    patches: tuple[Patch, ...]
    only: str


MUTANTS = {
    "no idempotency key": Mutant(
        (
            Patch(
                "storage/postgres/migrations/0002_numbered_messages.sql",
                "CREATE UNIQUE INDEX IF NOT EXISTS chat_messages_client_message_id",
                "CREATE INDEX IF NOT EXISTS chat_messages_client_message_id",
            ),
            Patch(
                "storage/postgres/migrations/repeatable/chat_append.sql",
                "AND m.client_message_id = a.client_message_id",
                "AND false",
            ),
            Patch(
                "storage/postgres/migrations/repeatable/chat_append.sql",
                "coalesce(i.client_message_id, i.message_id)",
                "i.message_id",
            ),
        ),
        only="the way to postgres",
    ),
    "gaps are not filled": Mutant(
        (
            Patch(
                "server/live/catch_up.py",
                "while channel.streams and channel.head is not None"
                " and channel.head < channel.target:",
                "while False:",
            ),
        ),
        only="valkey",
    ),
    "Redis is believed without a proof": Mutant(
        (
            Patch(
                "storage/history.py",
                "    first, last = records[0].seq, records[-1].seq\n",
                "    if after is None:\n"
                "        return Page(list(records[-size:]), records[-1].seq)\n"
                "    newer = [record for record in records if record.seq > after]\n"
                "    return Page(newer, records[-1].seq)\n"
                "    first, last = records[0].seq, records[-1].seq\n",
            ),
        ),
        only="valkey",
    ),
    "nobody looks for missed messages": Mutant(
        (
            Patch(
                "server/live/catch_up.py",
                "            nursery.start_soon(self._look_for_missed)\n",
                "",
            ),
        ),
        only="valkey",
    ),
    "Redis of the lost future is believed": Mutant(
        (
            Patch(
                "storage/store.py",
                "            self._keys.enter(epoch)\n",
                "            self._keys.enter(0)\n",
            ),
        ),
        only="is restored",
    ),
}


def main(
    name: Annotated[str, typer.Argument(help="Mutants whose names have this in them.")] = "",
) -> None:
    """Take each safeguard out, and see whether the campaign notices."""
    table = Table(title="mutants", title_justify="left")
    for column in ("", "without its safeguard", "found", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    survived = 0
    chosen = {each: mutant for each, mutant in MUTANTS.items() if name in each}
    if not chosen:
        raise typer.BadParameter(f"no mutant has {name!r} in its name")
    for each, mutant in chosen.items():
        began = time.monotonic()
        found = _violations(mutant)
        survived += not found
        seconds = f"{time.monotonic() - began:.0f}"
        console.print(f"{each}: {found or 'no violation'} ({seconds} s)")
        table.add_row("caught" if found else "SURVIVED", each, found or "no violation", seconds)
    console.print(table)
    if survived:
        raise typer.Exit(1)


def _violations(mutant: Mutant) -> str:
    """What a campaign over the mutant found, "" for nothing.

    Raises:
        Broken
    """
    with copied(PACKAGES, mutant.patches, work=WORK) as root:
        command = [sys.executable, "-m", "bench.faults", "--seed", str(SEED)]
        command += ["--minutes", str(MINUTES), "--channels", "100", "--rate", "100"]
        try:
            ran = subprocess.run(
                [*command, "--only", mutant.only],
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Broken("the campaign did not end") from None
    told = re.search(r"^violations: (\d+)(?: \((.*)\))?$", ran.stdout, re.MULTILINE)
    if told is None:
        raise Broken(f"the campaign failed:\n{ran.stdout[-3000:]}")
    return told[2] or ""


if __name__ == "__main__":
    typer.run(main)
