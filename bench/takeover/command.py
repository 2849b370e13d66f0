"""`python -m bench takeover`."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from bench.subjects import sottovoce
from bench.takeover.measure import Felt, Rows, backup, fill, measure, run_migrate

DATABASE = "takeover"
WITHOUT_SECONDS = 20.0
"""How long the application is watched without a migration, for comparison."""
BACKUP_SECONDS = 15.0
"""How long a backup goes on reading once `migrate` waits for it."""
SHOWN = 6
"""Lines that are shown of what `migrate` said."""

TABLE_WIDTH = 140

console = Console(stderr=True, soft_wrap=True, highlight=False)


def takeover(
    messages: Annotated[int, typer.Option(min=1, help="Old ones.")] = 1_000_000,
    channels: Annotated[int, typer.Option(min=1, help="That they are spread over.")] = 10_000,
    rate: Annotated[float, typer.Option(min=1.0, help="The application's statements/s.")] = 100.0,
    layout: Annotated[str, typer.Option(help="guide or application.")] = "guide",
    limit: Annotated[float, typer.Option(min=1.0, help="Milliseconds of standstill.")] = 200.0,
    source: Annotated[
        Path | None, typer.Option(help="Another tree of ours, whose `migrate` is measured.")
    ] = None,
) -> None:
    """Run `sottovoce migrate` beside an application at work, and see how long that stands still.

    Three times: without a migration, with one, and with one while a backup reads both tables. Ends
    with 1 where a statement or a lock took longer than the limit, the application was refused
    something, or `migrate` failed.
    """
    rows = Rows(messages, channels)
    felt: list[Felt] = []
    with sottovoce(1, pinned=False) as server:
        for case in ("without", "migrate", "migrate, and a backup that reads"):
            with _database(server.database_url) as conninfo:
                console.print(f"{case}: {messages:,} messages in {channels:,} channels are made")
                fill(conninfo, layout, rows)
                console.print(f"{case}: the application works")
                felt.append(_measure(case, conninfo, layout, rows, rate, source))
                for line in felt[-1].said[:SHOWN]:
                    console.print(f"    {line}", style="dim")
    show(felt, limit, Console(width=None if sys.stdout.isatty() else TABLE_WIDTH))
    if exceeded(felt, limit):
        raise typer.Exit(1)


def exceeded(felt: list[Felt], limit: float) -> list[str]:
    """The cases in which the application stood still for longer than `limit` milliseconds or was
    refused something, or the migration failed."""
    return [
        each.case
        for each in felt
        if each.status != 0
        or each.failures
        or max(each.longest_statement, each.longest_wait, each.longest_hold) * 1000 > limit
    ]


def show(felt: list[Felt], limit: float, out: Console) -> None:
    """Print a line for each case."""
    table = Table("", "migrate", "took", "statements", "refused", "a second")
    for head in ("p50", "p99", "longest", "longest wait", "longest lock"):
        table.add_column(head, justify="right")
    for each in felt:
        over = each.case in exceeded([each], limit)
        table.add_row(
            f"[red]{each.case}" if over else each.case,
            {0: "ok"}.get(each.status, f"exit status {each.status}") if each.said else "",
            f"{each.seconds:.1f} s",
            f"{each.statements:,}",
            str(each.failures),
            f"{each.rate:.0f}",
            *(
                f"{value * 1000:.0f} ms"
                for value in (
                    each.p50, each.p99, each.longest_statement, each.longest_wait,
                    each.longest_hold,
                )
            ),
        )  # fmt: skip
    out.print(table)
    for each in felt:
        if each.held:
            out.print(f"longest lock, {each.case}: {each.held}")
    out.print(f"limit: {limit:.0f} ms")


def _measure(
    case: str,
    conninfo: Mapping[str, Any],
    layout: str,
    rows: Rows,
    rate: float,
    source: Path | None,
) -> Felt:
    def without() -> tuple[int, list[str]]:
        time.sleep(WITHOUT_SECONDS)
        return 0, []

    def alone() -> tuple[int, list[str]]:
        return run_migrate(conninfo, source)

    def beside_a_backup() -> tuple[int, list[str]]:
        with backup(conninfo, BACKUP_SECONDS):
            return run_migrate(conninfo, source)

    run = {"without": without, "migrate": alone}.get(case, beside_a_backup)
    return measure(case, conninfo, layout, rows, rate=rate, run=run)


@contextmanager
def _database(url: str) -> Iterator[dict[str, Any]]:
    """A database of its own on the server's PostgreSQL; libpq's keywords."""
    parts = urlsplit(url)
    server: dict[str, Any] = {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
        "sslmode": "disable",
    }
    with psycopg.connect(**server, dbname="postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {DATABASE}".encode())
        connection.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0".encode())
        try:
            yield {**server, "dbname": DATABASE}
        finally:
            connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)".encode())
