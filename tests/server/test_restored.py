"""`sottovoce restored`: what it changes, what it says, and what it never prints."""

import os
import re

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from storage.postgres import epoch
from tests.server.test_cli import GOOD, SECRET, database_environment
from tests.support.services import Database


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "SETTLE_SECONDS", 0)


def run(*arguments: str, **environ: str) -> Result:
    """In this process, in an environment that has nothing but `environ`."""
    nothing = dict.fromkeys(os.environ)
    result = CliRunner(env=nothing | environ).invoke(app, ["restored", *arguments])
    assert SECRET not in result.output
    return result


def test_it_begins_an_epoch_and_says_what_to_do_next(database: Database):
    result = run(**database_environment(database))
    [(new,)] = database.execute("SELECT epoch FROM chat_epoch")
    assert (result.exit_code, result.stdout) == (0, f"epoch 0 -> {new}\n")
    assert "start the servers" in result.stderr
    again = run(**database_environment(database))
    assert again.stdout.startswith(f"epoch {new} -> ")


def test_its_help_has_the_steps_in_their_order():
    text = re.sub(r"\W+", " ", run("--help").output)
    assert "stop the servers restore sottovoce restored start the servers" in text


def test_a_database_that_does_not_take_it_leaves_no_doubt(empty_database: Database):
    for environ in (GOOD, database_environment(empty_database)):
        result = run(**environ)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "do not start the servers" in result.stderr


def test_it_names_what_is_missing():
    result = run()
    assert result.exit_code == 2
    missing = [line.split()[1] for line in result.stderr.splitlines()]
    assert missing == ["DB_HOST", "DB_USER", "DB_DATABASE"]
