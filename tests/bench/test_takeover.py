"""`sottovoce migrate` beside an application at work: the benchmark's small sister.

The limits are generous, for the machine may be busy; `python -m bench takeover` has the real one.
"""

from functools import partial
from typing import Any

import pytest

from bench.takeover.command import exceeded
from bench.takeover.measure import Felt, Rows, backup, fill, measure, run_migrate
from storage.embedded import EmbeddedPostgres
from tests.support.services import fresh_database

ROWS = Rows(messages=20_000, channels=200)
RATE = 50.0
BACKUP_SECONDS = 6.0
"""How long `migrate` has to wait: for longer than what is allowed below."""
LONG_SECONDS = 3.0
"""More than any statement may take, and less than one that stands behind the backup."""


@pytest.mark.parametrize("layout", ["guide", "application"])
def test_an_application_at_work_is_not_kept_waiting(postgres: EmbeddedPostgres, layout: str):
    with fresh_database(postgres) as database:
        fill(database.conninfo, layout, ROWS)
        run = partial(run_migrate, database.conninfo, None)
        felt = measure("migrate", database.conninfo, layout, ROWS, rate=RATE, run=run)
        again = run_migrate(database.conninfo, None)
    assert (felt.status, felt.failures) == (0, 0), felt.said
    assert exceeded([felt], LONG_SECONDS * 1000) == []
    assert again == (0, ["nothing to apply"])


def test_a_backup_is_waited_for_by_name_and_nobody_stands_behind_it(postgres: EmbeddedPostgres):
    with fresh_database(postgres) as database:
        fill(database.conninfo, "guide", ROWS)

        def run() -> tuple[int, list[str]]:
            with backup(database.conninfo, BACKUP_SECONDS):
                return run_migrate(database.conninfo, None)

        felt = measure("migrate", database.conninfo, "guide", ROWS, rate=RATE, run=run)
    assert (felt.status, felt.failures) == (0, 0), felt.said
    assert felt.seconds >= BACKUP_SECONDS
    assert exceeded([felt], LONG_SECONDS * 1000) == []
    assert any("waiting for" in line and "backup" in line for line in felt.said), felt.said


FINE = Felt("fine", 9.0, 900, 0, 100.0, 0.001, 0.01, 0.15, 0.1, 0.05, "", 0, ["applied"])


OVER: dict[str, Any] = {
    "longest_statement": 0.3,
    "longest_wait": 0.3,
    "longest_hold": 0.3,
    "failures": 1,
    "status": 1,
}


@pytest.mark.parametrize("name", OVER)
def test_what_is_over_the_limit_is_named(name: str):
    changed: dict[str, Any] = {"case": "slow", name: OVER[name]}
    over = FINE._replace(**changed)
    assert exceeded([FINE], 200.0) == []
    assert exceeded([FINE, over], 200.0) == ["slow"]
