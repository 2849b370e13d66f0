"""`python -m loadtest run`: a server of its own, people, and Locust on them; or any deployment.

Each scenario is a locustfile in `loadtest/scenarios` and runs under plain `locust -f`, too; this
adds a server to try it on and the options that the scenario is meant for.
"""

import contextlib
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from loadtest.local import ROOT, LocalServer, ServerFailed, local_server

WORK = ROOT / ".load"
"""Reports and the servers' data; ignored by git."""
SCENARIOS = Path(__file__).with_name("scenarios")
SPAWN_PER_SECOND = 250.0
"""Streams that begin in a second; one worker on a core of its own begins 3,700."""
GRACE_SECONDS = 300.0
"""For Locust to come, to settle and to go, over the time of the run."""
STOP_SECONDS = 30.0

cli = typer.Typer(add_completion=False, help=__doc__)
console = Console(soft_wrap=True, highlight=False)


class Scenario(StrEnum):
    HOLD = "hold"
    STEPS = "steps"
    SOAK = "soak"
    HERD = "herd"
    CHAT = "chat"
    DAY = "day"
    SLOW = "slow_readers"
    REDIS = "redis_killed"


class Usual(NamedTuple):
    """What a scenario is run with, unless the command line says otherwise.

    Attributes:
        sends: a second, of all users together.
        extra: more of Locust's and our options.
        settings: of our own server.
    """

    users: int = 1_000
    sends: float = 600.0
    minutes: float = 2.0
    extra: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


USUAL = {
    Scenario.HOLD: Usual(),
    Scenario.STEPS: Usual(users=15_000, sends=1_500.0, minutes=60.0),
    Scenario.SOAK: Usual(users=5_000, sends=100.0, minutes=480.0, extra=("--cut-every", "300")),
    Scenario.HERD: Usual(users=2_000, sends=100.0),
    Scenario.CHAT: Usual(users=500, extra=("--haste", "5")),
    Scenario.DAY: Usual(users=500, minutes=10.0, extra=("--haste", "5")),
    # Four messages a second on each channel, and an outbox that they fill in less than a minute.
    Scenario.SLOW: Usual(users=100, sends=200.0, settings=(("SOTTOVOCE_OUTBOX_BYTES", "16384"),)),
    Scenario.REDIS: Usual(users=500, sends=200.0),
}

ScenarioName = Annotated[Scenario, typer.Argument(help="A file of loadtest/scenarios.")]
Users = Annotated[int | None, typer.Option(min=1, help="At most; else what the scenario has.")]
Sends = Annotated[float | None, typer.Option(min=0.0, help="Messages a second, of all users.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Of the run.")]
Rate = Annotated[float, typer.Option(min=0.1, help="Users that come in a second.")]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Of our own server.")]
Host = Annotated[str, typer.Option(help="A deployment's URL, in place of a server of our own.")]
Tokens = Annotated[
    Path | None, typer.Option(help="For --host: what `sottovoce seed` wrote for it.", exists=True)
]
Heartbeat = Annotated[float, typer.Option(min=0.2, help="SOTTOVOCE_HEARTBEAT_SECONDS.")]
Out = Annotated[Path, typer.Option(help="The folder of the reports.")]


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    scenario: ScenarioName = Scenario.HOLD,
    users: Users = None,
    sends_per_second: Sends = None,
    minutes: Minutes = None,
    spawn_rate: Rate = SPAWN_PER_SECOND,
    server_workers: Workers = 1,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="Of Locust: over one, a master and its workers.")
    ] = 1,
    host: Host = "",
    tokens: Tokens = None,
    heartbeat_seconds: Heartbeat = 15.0,
    out: Out = WORK,
) -> None:
    """Run a scenario to its end. Exits with 1 if an objective was missed, with 3 if only times
    were and the generator was the limit. Further options are Locust's."""
    usual = USUAL[scenario]
    users = users or usual.users
    seconds = 60 * (minutes or usual.minutes)
    sends = usual.sends if sends_per_second is None else sends_per_second
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prefix = out / scenario
    arguments = [
        "--headless", "--only-summary", "--loglevel", "ERROR", "--run-time", f"{seconds:.0f}",
        "--html", f"{prefix}.html", "--csv", str(prefix), "--csv-full-history",
        "--summary", f"{prefix}.json", "--json-file", f"{prefix}_stats",
        "--users", str(users), "--spawn-rate", str(spawn_rate),
        "--sends-per-stream", f"{sends / users:.9g}",
        "--heartbeat-seconds", str(heartbeat_seconds), *usual.extra, *context.args,
    ]  # fmt: skip
    with _server(scenario, users, server_workers, host, tokens, heartbeat_seconds) as target:
        code = _locust(scenario, [*target, *arguments], processes, seconds + GRACE_SECONDS)
    console.print(f"{prefix}.html, {prefix}.json, {prefix}_stats.csv")
    raise typer.Exit(code)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ui(
    context: typer.Context,
    scenario: ScenarioName = Scenario.HOLD,
    users: Users = None,
    sends_per_second: Sends = None,
    spawn_rate: Rate = SPAWN_PER_SECOND,
    server_workers: Workers = 1,
    host: Host = "",
    tokens: Tokens = None,
    web_port: Annotated[int, typer.Option(min=1, max=65535, help="Of Locust's page.")] = 8089,
) -> None:
    """Locust's web page, on this machine only; its form starts and stops the run. Ctrl-C ends
    everything."""
    usual = USUAL[scenario]
    users = users or usual.users
    sends = usual.sends if sends_per_second is None else sends_per_second
    WORK.mkdir(exist_ok=True)
    arguments = [
        "--web-host", "127.0.0.1", "--web-port", str(web_port),
        "--users", str(users), "--spawn-rate", str(spawn_rate),
        "--run-time", f"{60 * usual.minutes:.0f}", "--sends-per-stream", f"{sends / users:.9g}",
        *usual.extra, *context.args,
    ]  # fmt: skip
    with _server(scenario, users, server_workers, host, tokens, 15.0) as target:
        console.print(f"http://127.0.0.1:{web_port}  charts: http://127.0.0.1:{web_port}/sottovoce")
        code = _locust(scenario, [*target, *arguments], 1, None)
    raise typer.Exit(code)


@contextlib.contextmanager
def _server(
    scenario: Scenario,
    users: int,
    workers: int,
    host: str,
    tokens: Path | None,
    heartbeat_seconds: float,
) -> Iterator[list[str]]:
    """Locust's options for the server that is there, or one of our own as long as the block."""
    if host:
        if tokens is None:
            raise typer.BadParameter("--host needs --tokens, which `sottovoce seed` writes")
        if scenario is Scenario.REDIS:
            raise typer.BadParameter("only the Redis of a server of our own is killed")
        yield ["--host", host, "--tokens", str(tokens.resolve())]
        return
    WORK.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="server-", dir=WORK))
    folder.chmod(0o755)  # PostgreSQL may run as somebody else
    settings = {
        "SOTTOVOCE_HEARTBEAT_SECONDS": str(heartbeat_seconds),
        **dict(USUAL[scenario].settings),
    }
    try:
        with local_server(folder, workers=workers, settings=settings) as server:
            yield _seeded(server, folder / "tokens", users)
    except ServerFailed as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    shutil.rmtree(folder, ignore_errors=True)


def _seeded(server: LocalServer, tokens: Path, users: int) -> list[str]:
    """A therapist takes eight pairs; people who come before her take some of their own."""
    server.seed(2 * users, tokens)
    return [
        "--host", server.url, "--tokens", str(tokens), "--server-ready", str(server.ready_file),
    ]  # fmt: skip


def _locust(scenario: Scenario, arguments: list[str], processes: int, seconds: float | None) -> int:
    """Locust itself, with as many workers as there are processes if there are several."""
    file = str(SCENARIOS / f"{scenario}.py")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "locust", "-f", file]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        if processes > 1:
            port = _free_port()
            arguments = [
                *arguments, "--master", "--master-bind-host", "127.0.0.1",
                "--master-bind-port", str(port), "--expect-workers", str(processes),
            ]  # fmt: skip
            worker = [
                *command,
                "--worker",
                "--master-host",
                "127.0.0.1",
                "--master-port",
                str(port),
            ]
            workers = [
                subprocess.Popen([*worker, "--loglevel", "ERROR"], env=env, cwd=ROOT)
                for _ in range(processes)
            ]
        main = subprocess.Popen([*command, *arguments], env=env, cwd=ROOT)
        workers.append(main)
        try:
            return main.wait(seconds)
        except subprocess.TimeoutExpired:
            console.print("Locust does not come to an end", style="red")
            return 2
        except KeyboardInterrupt:
            return main.wait(STOP_SECONDS)
    finally:
        for process in workers:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(math.ceil(STOP_SECONDS / 3))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


if __name__ == "__main__":
    cli()
