"""`sottovoce evict`: what is told to whom, and how it says that nobody was."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from server.cli import app
from storage.contract import Eviction
from storage.redis import Keys

SECRET = "canary-5ecret"
DATABASE = {"host": "db.example.com", "port": 5432, "dbname": "app"}
ENVIRONMENT = {"DB_HOST": "db.example.com", "DB_PORT": "5432", "DB_DATABASE": "app"}


def run(*arguments: str, **environ: str) -> Result:
    """In this process, in an environment that has nothing but `environ`."""
    nothing = dict.fromkeys(os.environ)
    result = CliRunner(env=nothing | environ).invoke(app, ["evict", *arguments])
    assert SECRET not in result.output
    return result


@pytest.mark.parametrize(
    ("arguments", "eviction"),
    [
        (["--user", "7"], Eviction(user_id=7)),
        (["--clerk-id", "user_x"], Eviction(clerk_id="user_x")),
        (["--channel", "12"], Eviction(channel_id=12)),
        (["--user", "7", "--channel", "12"], Eviction(user_id=7, channel_id=12)),
        (["--all"], Eviction(all=True)),
    ],
)
def test_an_eviction_is_published_and_the_same_command_is_shown(
    redis_url: str, arguments: list[str], eviction: Eviction
):
    heard: list[Any] = []
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        pubsub.subscribe(Keys(DATABASE).control)
        pubsub.get_message(timeout=5)
        result = run(*arguments, UPSTASH_REDIS_URL=redis_url, **ENVIRONMENT)
        command = result.stdout.split()
        client.execute_command(*command)
        deadline = time.monotonic() + 5
        while len(heard) < 2 and time.monotonic() < deadline:
            if message := pubsub.get_message(timeout=1):
                heard.append(message["data"])
    assert (result.exit_code, result.stderr) == (0, "heard by 1 workers\n")
    assert [Eviction.decode(raw) for raw in heard] == [eviction, eviction]


def test_upstashs_address_for_rest_is_enough():
    """Nobody listens there: that it was tried is all that can be seen."""
    rest = {"UPSTASH_REDIS_REST_URL": "https://127.0.0.1", "UPSTASH_REDIS_REST_TOKEN": SECRET}
    result = run("--all", **rest, **ENVIRONMENT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nobody was told" in result.stderr


def test_whom_to_evict_must_be_said():
    result = run(UPSTASH_REDIS_URL="redis://127.0.0.1:1", **ENVIRONMENT)
    assert (result.exit_code, "--clerk-id" in result.stderr) == (2, True)


def test_what_is_missing_is_named():
    result = run("--all")
    assert result.exit_code == 2
    missing = [line.split()[1] for line in result.stderr.splitlines()]
    assert missing == ["UPSTASH_REDIS_URL", "DB_HOST", "DB_DATABASE"]


def test_a_redis_that_is_gone_is_an_error_and_its_url_is_not_shown():
    result = run("--all", UPSTASH_REDIS_URL=f"redis://:{SECRET}@127.0.0.1:1", **ENVIRONMENT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nobody was told" in result.stderr


def test_without_a_running_dev_its_data_folder_is_refused(folder: Path):
    result = run("--all", "--data-dir", str(folder))
    assert (result.exit_code, "no sottovoce dev is running" in result.stderr) == (2, True)
