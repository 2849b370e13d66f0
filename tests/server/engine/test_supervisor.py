"""Real worker processes, around an application that breaks as it is told."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import trio

from server.engine import supervisor as engine
from server.engine.sockets import listen, url_of
from server.engine.supervisor import Supervisor, WorkersFailed
from tests.support.wire import WIRE

SETTINGS = {
    "UPSTASH_REDIS_URL": "redis://127.0.0.1",
    "DB_HOST": "127.0.0.1",
    "DB_USER": "nobody",
    "DB_DATABASE": "none",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_MTI3LjAuMC4xJA==",
    "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": "true",
    "SOTTOVOCE_DRAIN_SECONDS": "0.1",
}


class Server:
    def __init__(self, supervisor: Supervisor, url: str) -> None:
        self.supervisor = supervisor
        self.url = url

    async def ask(self, path: str = "/") -> tuple[int, str]:
        """(the worker's pid, whether the chat is on, as it says)"""
        async with httpx.AsyncClient(**WIRE.client) as client:
            pid, enabled = (await client.get(f"{self.url}{path}")).text.split()
            return int(pid), enabled

    async def until(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(15):
            while not condition():
                await trio.sleep(0.02)


@asynccontextmanager
async def running(
    mode: str = "", *, workers: int = 1, stop: bool = True, **options: Any
) -> AsyncIterator[Server]:
    env = {"PATH": os.defpath, "PYTHONPATH": str(Path.cwd()), "TINY": mode} | SETTINGS
    with listen("127.0.0.1", 0, stall_seconds=20) as sock:
        supervisor = Supervisor(
            sock,
            workers=workers,
            env=env,
            drain_seconds=0.1,
            options=WIRE.options,
            app="tests.server.engine.tiny_app:app",
            **options,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            yield Server(supervisor, url_of(sock, tls=WIRE.tls))
            if stop:
                supervisor.stop()


async def test_workers_serve_drain_and_leave_no_process(capfd):
    async with running(workers=2) as server:
        pids = server.supervisor.pids
        assert len(pids) == 2
        assert (await server.ask())[0] in pids
    assert server.supervisor.pids == []
    assert not any(map(psutil.pid_exists, pids))
    assert capfd.readouterr().out.count("drained") == 2


async def test_a_worker_that_is_killed_is_replaced_and_that_is_told():
    changes = []
    async with running(workers=2, on_change=lambda: changes.append(1)) as server:
        before = server.supervisor.pids
        os.kill(before[0], signal.SIGKILL)
        await server.until(lambda: changes)
        after = server.supervisor.pids
        assert after[1] == before[1] and after[0] != before[0]
        assert changes == [1]


async def test_a_worker_whose_application_ends_early_is_replaced():
    changes = []
    async with running(on_change=lambda: changes.append(1)) as server:
        before, _ = await server.ask("/end-lifespan")
        await server.until(lambda: changes)
        assert (await server.ask())[0] != before


async def test_a_request_that_breaks_is_logged_without_its_words(capfd):
    async with running() as server:
        with pytest.raises((httpx.HTTPError, ValueError)):
            await server.ask("/fail")
        await server.ask()
    logged = capfd.readouterr()
    assert "RuntimeError" in logged.out
    assert "canary" not in logged.out + logged.err


async def test_settings_that_are_refused_are_not_tried_again(capfd):
    with pytest.RaisesGroup(WorkersFailed, allow_unwrapped=True), trio.fail_after(15):
        async with running("refuses"):
            pytest.fail("it came up")
    assert capfd.readouterr().err.count("a finding") == 1


@pytest.mark.parametrize("mode", ["exits", "raises"])
async def test_workers_that_die_again_and_again_are_given_up(mode, monkeypatch, capfd):
    monkeypatch.setattr(engine, "MAX_YOUNG_DEATHS", 2)
    with pytest.RaisesGroup(WorkersFailed, allow_unwrapped=True), trio.fail_after(15):
        async with running(mode):
            pytest.fail("it came up")
    assert "canary" not in "".join(capfd.readouterr())


async def test_who_can_let_nobody_in_serves_all_the_same_to_say_so(capfd):
    async with running("unready") as server:
        assert (await server.ask())[0] in server.supervisor.pids
    assert "worker_not_ready" in capfd.readouterr().out


async def test_told_to_stop_twice_it_does_not_wait_for_a_drain_that_hangs():
    async with running("hangs", stop=False) as server:
        (pid,) = server.supervisor.pids
        server.supervisor.stop()
        await trio.sleep(0.3)
        assert psutil.pid_exists(pid)
        server.supervisor.stop()
        with trio.fail_after(3):
            while psutil.pid_exists(pid):
                await trio.sleep(0.02)


async def test_a_reload_reads_the_env_file_and_turns_the_chat_off_and_on(folder: Path):
    env_file = folder / "env"
    env_file.write_text("NEXT_PUBLIC_ENABLE_CHAT_FEATURE=true\n")
    async with running(env_file=env_file) as server:
        for words, enabled in (("", "True"), ("NEXT_PUBLIC_ENABLE_CHAT_FEATURE=off", "False")):
            env_file.write_text(words)
            server.supervisor.reload()
            with trio.fail_after(5):
                while (await server.ask())[1] != enabled:
                    await trio.sleep(0.02)


async def test_a_supervisor_that_is_cancelled_leaves_no_process():
    with trio.CancelScope() as scope:
        async with running(workers=2, stop=False) as server:
            pids = server.supervisor.pids
            scope.cancel()
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.once  # Hypercorn's own connections are closed when they are silent as it ends
async def test_a_roll_replaces_every_worker_and_turns_nobody_away():
    changes = []
    async with running(workers=2, on_change=lambda: changes.append(1)) as server:
        before = server.supervisor.pids
        server.supervisor.roll()
        with trio.fail_after(30):
            while len(changes) < 2:
                await server.ask()  # a connection of its own, each time
        after = server.supervisor.pids
        assert len(after) == 2 and not {*after} & {*before}
        assert not any(map(psutil.pid_exists, before))
        assert (await server.ask())[0] in after


async def test_a_roll_stops_at_a_successor_that_dies_and_the_old_ones_serve_on(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    env_file = folder / "env"
    env_file.write_text("")
    async with running(workers=2, env_file=env_file) as server:
        before = server.supervisor.pids
        env_file.write_text("TINY=exits\n")
        server.supervisor.roll()
        printed = ""
        with trio.fail_after(15):
            while "roll_stopped" not in printed:
                printed += capfd.readouterr().out
                await trio.sleep(0.02)
        assert server.supervisor.pids == before
        assert (await server.ask())[0] in before


async def test_a_worker_that_does_not_retire_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "END_SECONDS", 0.5)
    changes = []
    async with running("hangs", on_change=lambda: changes.append(1)) as server:
        (before,) = server.supervisor.pids
        server.supervisor.roll()
        await server.until(lambda: changes)
        assert not psutil.pid_exists(before)
        assert (await server.ask())[0] != before


async def test_stopped_in_the_middle_of_a_roll_it_leaves_no_process():
    others = set(psutil.Process().children())
    async with running(workers=2) as server:
        server.supervisor.roll()
        await server.until(lambda: len(set(psutil.Process().children()) - others) == 3)
    assert set(psutil.Process().children()) <= others
