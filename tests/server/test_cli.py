"""The commands, without a server: what they refuse, in which words, and what they never print."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import jwt
import pytest
import structlog
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.local_issuer import LocalIssuer, SigningKey
from server.cli.ready import write_private
from server.settings import issuer_of
from server.version import VERSION
from tests.storage.test_migrations import old_deployment
from tests.support.running import run_command
from tests.support.services import Database
from tests.support.tokens import Signer

SECRET = "canary-5ecret"

GOOD = {
    "UPSTASH_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1",
    "DB_HOST": "127.0.0.1",
    "DB_PORT": "1",
    "DB_USER": "user",
    "DB_PASSWORD": SECRET,
    "DB_DATABASE": "database",
    "SOTTOVOCE_DB_SSLMODE": "disable",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_MTI3LjAuMC4xJA==",
    "CLERK_SECRET_KEY": SECRET,
}


def run(*arguments: str, **environ: str) -> Result:
    """In this process, in an environment that has nothing but `environ`."""
    nothing = dict.fromkeys(os.environ)
    try:
        result = CliRunner(env=nothing | environ).invoke(app, arguments)
    finally:
        structlog.reset_defaults()  # a command sets up the logs of its process, which is ours here
    assert SECRET not in result.output
    return result


def database_environment(database: Database) -> dict[str, str]:
    conninfo = database.conninfo
    return {
        "DB_HOST": conninfo["host"],
        "DB_PORT": str(conninfo["port"]),
        "DB_USER": conninfo["user"],
        "DB_PASSWORD": conninfo["password"],
        "DB_DATABASE": conninfo["dbname"],
        "SOTTOVOCE_DB_SSLMODE": "disable",
    }


def test_serve_names_each_missing_setting_in_a_line_of_its_own():
    result = run("serve")
    assert result.exit_code == 2
    missing = [line.split()[1] for line in result.stderr.splitlines()]
    assert missing == [
        "UPSTASH_REDIS_URL",
        "DB_HOST",
        "DB_USER",
        "DB_DATABASE",
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY",
    ]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UPSTASH_REDIS_URL", f"https://:{SECRET}@example.com"),
        ("DB_PORT", SECRET),
        ("SOTTOVOCE_DB_SSLMODE", SECRET),
        ("NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY", SECRET),
        ("CLERK_JWT_KEY", SECRET),
        ("SOTTOVOCE_HEARTBEAT_SECONDS", "-1"),
        ("SOTTOVOCE_HARTBEAT_SECONDS", "15"),
    ],
)
def test_serve_names_a_wrong_setting_and_never_its_value(name, value):
    result = run("serve", **GOOD | {name: value})
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert name in line and value not in line.split()


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}#word@cache:6379",
        f"redis://:{SECRET}/word@cache:6379",
        f"redis://:{SECRET}?word@cache:6379",
        f"redis://:{SECRET}%word@cache:6379",
        f"redis://:{SECRET}@word@cache:6379",
        f"redis://:{SECRET}[word@cache:6379",
        f"redis://:{SECRET}@cache:port",
        f"redis://:{SECRET}@cache:6379/word",
        f"redis://:{SECRET}@:6379",
        f"redis://:{SECRET}@cache..word",
        f"redis://:{SECRET}@cache?word=1",
        f" redis://:{SECRET}@cache",
        f'"redis://:{SECRET}@cache"',
        f"https://{SECRET}.upstash.io",
        f"redis-sentinel://:{SECRET}#word@cache/0#main",
        f"redis-cluster://:{SECRET}/word@cache",
    ],
)
def test_serve_ends_with_a_line_on_a_url_of_redis_that_is_wrong(url: str):
    """No worker is started that would crash of it."""
    result = run("serve", **GOOD | {"UPSTASH_REDIS_URL": url})
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("sottovoce: UPSTASH_REDIS_URL is wrong: ")
    doctor = run("doctor", **GOOD | {"UPSTASH_REDIS_URL": url})
    assert doctor.exit_code == 1
    assert line.removeprefix("sottovoce: ") in doctor.stdout
    for secret in (SECRET, "word@", "cache"):
        assert secret not in result.stderr + doctor.stdout


def test_migrate_does_not_look_at_the_url_of_redis(empty_database: Database):
    wrong = {"UPSTASH_REDIS_URL": f"redis://:{SECRET}#word@cache"}
    result = run("migrate", **database_environment(empty_database) | wrong)
    assert (result.exit_code, result.stderr) == (0, "")


def test_serve_says_that_the_chat_is_off_and_why():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])  # it says so before it finds that it cannot listen
        log_format = {"SOTTOVOCE_LOG_FORMAT": "console"}
        for value, why in {"TRUE": "to the letter", "": "is not set"}.items():
            flag = {"NEXT_PUBLIC_ENABLE_CHAT_FEATURE": value}
            environ = GOOD | log_format | flag | {"SOTTOVOCE_HEARTBEAT_SECONDS": "45"}
            done = run_command("serve", "--host", "127.0.0.1", "--port", port, **environ)
            said = [line for line in done.stderr.splitlines() if "setting_doubtful" in line]
            assert [why in line for line in said] == [True, False]
            assert "the chat is off" in said[0] and "SOTTOVOCE_HEARTBEAT_SECONDS" in said[1]
            assert SECRET not in done.stdout + done.stderr


def test_the_version_is_told():
    result = run("--version")
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["sottovoce", VERSION])


def test_serve_takes_the_env_files_value_over_the_environments(folder: Path):
    file = folder / "env"
    file.write_text("DB_PORT=no number\nDB_PASSWORD=a$b${c}\n")
    result = run("serve", "--env-file", str(file), **GOOD)
    assert result.exit_code == 2
    assert "DB_PORT" in result.stderr


def test_serve_refuses_an_env_file_that_is_not_there(folder: Path):
    result = run("serve", "--env-file", str(folder / "none"), **GOOD)
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)


def test_dev_refuses_a_wrong_setting_before_it_starts_anything(folder: Path):
    result = run("dev", "--data-dir", str(folder / "data"), SOTTOVOCE_MAX_STREAMS="none")
    assert result.exit_code == 2
    assert "SOTTOVOCE_MAX_STREAMS" in result.stderr
    assert not (folder / "data").exists()


def test_migrate_lists_what_is_pending_applies_it_and_has_no_more(empty_database: Database):
    environ = database_environment(empty_database)
    pending = run("migrate", "--check", **environ)
    assert pending.exit_code == 1
    names = [line.removeprefix("pending ") for line in pending.stdout.splitlines()]
    assert names and all(name[:4].isdigit() for name in names)
    assert empty_database.execute("SELECT to_regclass('chat_messages')") == [(None,)]

    applied = run("migrate", **environ)
    assert applied.exit_code == 0
    lines = applied.stdout.splitlines()
    assert lines[: len(names)] == [f"applied {name}" for name in names]
    assert "applied function_chat_append" in lines

    for arguments in (["migrate"], ["migrate", "--check"]):
        again = run(*arguments, **environ)
        assert (again.exit_code, again.stdout) == (0, "nothing to apply\n")


def test_migrate_plans_without_a_change_what_it_would_do_to_whose_tables_under_which_lock(
    empty_database: Database,
):
    old_deployment(empty_database)
    environ = database_environment(empty_database)
    plan = run("migrate", "--plan", **environ)
    assert plan.exit_code == 0
    assert "chat_columns: chat_channels, chat_messages\n" in plan.stdout
    assert "    lock: ACCESS EXCLUSIVE, for milliseconds\n" in plan.stdout
    assert empty_database.execute("SELECT to_regclass('chat_migrations')") == [(None,)]
    assert run("migrate", **environ).exit_code == 0
    assert run("migrate", "--plan", **environ).stdout == "nothing to apply\n"


def test_migrate_names_all_that_does_not_fit_and_changes_nothing(empty_database: Database):
    old_deployment(empty_database)
    empty_database.execute("ALTER TABLE users DROP is_active, DROP email")
    refused = run("migrate", **database_environment(empty_database))
    assert refused.exit_code == 1
    assert refused.stderr.splitlines() == [
        "sottovoce: users.email is missing",
        "sottovoce: users.is_active is missing",
        "sottovoce: nothing was changed",
    ]
    assert empty_database.execute("SELECT to_regclass('chat_migrations')") == [(None,)]


def test_migrate_needs_nothing_but_the_database(empty_database: Database):
    result = run(
        "migrate", "--check", SOTTOVOCE_NONSENSE="1", **database_environment(empty_database)
    )
    assert result.exit_code == 1


def test_migrate_says_that_the_database_cannot_be_reached():
    result = run("migrate", **GOOD)
    assert result.exit_code == 1
    assert "cannot be reached: nothing listens on that port" in result.stderr


def test_migrate_names_what_is_missing():
    result = run("migrate")
    assert result.exit_code == 2
    assert [line.split()[1] for line in result.stderr.splitlines()] == [
        "DB_HOST",
        "DB_USER",
        "DB_DATABASE",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["token", "prospect"], ["seed", "--channels", "1", "--out", "x"], ["migrate"], ["restored"]],
)
def test_what_needs_a_running_dev_says_so(arguments, folder: Path):
    result = run(*arguments, "--data-dir", str(folder))
    assert result.exit_code == 2
    assert "no sottovoce dev is running" in result.stderr


def test_the_doctor_without_settings_and_without_a_dev_names_what_is_missing(folder: Path):
    result = run("doctor", "--data-dir", str(folder))
    assert result.exit_code == 1
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL settings — ")]
    assert len(failures) == 5
    assert "remedy: " in result.stdout


def test_a_private_file_is_the_owners_alone_even_where_it_was_not(folder: Path):
    file = folder / "new" / "file"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o644)
    write_private(file, b"content")
    assert file.read_bytes() == b"content"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_the_issuer_keeps_its_key_and_its_port(folder: Path):
    with LocalIssuer(folder) as issuer:
        first = (issuer.url, issuer.key.kid)
        assert issuer_of(issuer.publishable_key) == issuer.url
    with LocalIssuer(folder) as issuer:
        assert (issuer.url, issuer.key.kid) == first
        with LocalIssuer(folder) as second:  # the port is taken: another one
            assert second.url != issuer.url
    assert (folder / "issuer.pem").stat().st_mode & 0o777 == 0o600


def claims(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def test_a_local_token_looks_like_clerks(folder: Path):
    key = SigningKey(folder / "key.pem")
    token = key.sign("user_1", issuer="http://127.0.0.1:1", seconds=60)
    found = claims(token)
    assert found["exp"] - found["iat"] == 60
    assert (found["v"], found["sts"], found["sub"]) == (2, "active", "user_1")
    assert {"sid", "iss", "nbf"} <= set(found) and "azp" not in found
    assert jwt.get_unverified_header(token) == {"alg": "RS256", "typ": "JWT", "kid": key.kid}
    party = key.sign("user_1", issuer="http://127.0.0.1:1", authorized_party="https://a.example")
    assert claims(party)["azp"] == "https://a.example"
    assert json.loads(key.jwks)["keys"][0]["kid"] == key.kid
    assert b'"d"' not in key.jwks


def test_a_file_that_is_no_key_is_not_taken_for_one(folder: Path):
    path = folder / "key.pem"
    path.write_text(Signer().pem)  # public
    with pytest.raises(ValueError, match="no RSA key"):
        SigningKey(path)
