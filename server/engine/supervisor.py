"""The parent of the workers: starts them, replaces one that dies, ends them in order.

Each worker holds the write end of a pipe: a byte says that it serves, the end that it has died.
All of them hold the read end of the lifeline, which ends when this process does, however it
does: then they drain and end by themselves.
"""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import structlog
import trio
from prometheus_client import multiprocess

from server.engine.metrics_folder import MetricsFolder, metrics_folder
from server.engine.options import EngineOptions
from server.engine.worker import (
    END_SECONDS,
    MAX_REASON_BYTES,
    READY,
    START_SECONDS,
    WRONG_SETTINGS,
)
from storage.metric_files import FOLDER, NUMBER

READY_SECONDS = START_SECONDS + 15.0  # and for a slow machine to import everything
YOUNG_SECONDS = 10.0  # who dies younger never really served
MAX_YOUNG_DEATHS = 5  # of one worker's place within the next: then no restart will help
YOUNG_DEATHS_WINDOW_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.1  # doubled by each young death, jittered by half
MAX_PAUSE_SECONDS = 5.0
POLL_SECONDS = 0.02

log = structlog.get_logger("supervisor")


class WorkersFailed(Exception):
    """The workers cannot be kept running. The log, or standard error, says why."""


class Supervisor:
    """Keeps a number of workers on one socket.

    Run it in the main thread, in one nursery with what uses the server:

        await nursery.start(supervisor.run)   # returns when all of them serve

    Args:
        sock: it listens; the workers accept. Closed when they are told to end.
        workers: how many.
        env: of the workers.
        drain_seconds: `Settings.drain_seconds`, which the workers are given to end.
        options: the workers' engine and certificate; None: the usual engine, no TLS.
        env_file: read by each worker over `env`, again at `reload`.
        on_change: called when the workers' pids have changed and all of them serve.
        app: `module:attribute` of the ASGI application.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        workers: int,
        env: Mapping[str, str],
        drain_seconds: float,
        options: EngineOptions | None = None,
        env_file: Path | None = None,
        on_change: Callable[[], None] | None = None,
        app: str = "server.app:app",
    ) -> None:
        self._sock = sock
        self._env = dict(env)
        self._end_seconds = drain_seconds + END_SECONDS
        self._arguments = ["--app", app, *(options or EngineOptions()).arguments()]
        self._has_env_file = env_file is not None
        if env_file is not None:
            self._arguments += ["--env-file", str(env_file.resolve())]
        self._on_change = on_change
        # A place per worker, None while it has none; `_serving` says which of them are ready.
        self._workers: list[subprocess.Popen[bytes] | None] = [None] * workers
        self._serving = [False] * workers
        # Started by `_roll` to take the place of one that retires.
        self._successors: list[_Started | None] = [None] * workers
        self._metrics: MetricsFolder | None = None
        # By pid, of those that live: the lowest free one is the next one's.
        self._numbers: dict[int, int] = {}
        self._rolling = trio.Event()
        self._came_up = False
        self._settled = trio.Event()  # they came up, or never will
        self._stopping = trio.Event()
        self._failed = False
        self._hurry = False

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [worker.pid for worker in self._living()]

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """Let the workers drain and end; said a second time, end them now."""
        self._hurry = self._stopping.is_set()
        self._stopping.set()
        self._settled.set()

    def reload(self) -> None:
        """Have the workers read the env file again."""
        self._signal(signal.SIGHUP)

    def roll(self) -> None:
        """Replace the workers one after the other, each when its successor serves: for new code
        or new settings, without a moment in which nobody accepts."""
        self._rolling.set()

    async def obey_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """SIGTERM and SIGINT: `stop`. SIGUSR1: `roll`. SIGHUP: `reload` where there is an env
        file, and as usual the end where there is none: the terminal was closed."""
        with trio.open_signal_receiver(
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
        ) as signals:
            task_status.started()
            async for received in signals:
                if received == signal.SIGUSR1:
                    self.roll()
                elif received == signal.SIGHUP and self._has_env_file:
                    self.reload()
                else:
                    self.stop()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers until `stop`; when it returns or raises, none of them is left.

        It has started when all of them serve, or when it was stopped before that. Cancelled,
        it ends the workers as after `stop`: that takes `drain_seconds` and `END_SECONDS` at most.

        Raises:
            WorkersFailed: they did not come up in time, refuse their settings, or one of them
                dies again and again.
        """
        lifeline, our_end = os.pipe()
        try:
            with metrics_folder() as self._metrics:
                try:
                    async with trio.open_nursery() as nursery:
                        for place in range(len(self._workers)):
                            nursery.start_soon(self._keep, place, lifeline)
                        with trio.move_on_after(READY_SECONDS):
                            await self._settled.wait()
                        if not self._settled.is_set():
                            log.critical("workers_not_ready", seconds=READY_SECONDS)
                            self._give_up()
                        if not self._failed:
                            task_status.started()
                        nursery.start_soon(self._serve_rolls, lifeline)
                        await self._stopping.wait()
                        nursery.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._end_workers()
        finally:
            os.close(our_end)
            os.close(lifeline)
        if self._failed:
            raise WorkersFailed

    def _give_up(self) -> None:
        self._failed = True
        self._stopping.set()
        self._settled.set()

    async def _keep(self, place: int, lifeline: int) -> None:
        """Have a worker in this place, one after the other."""
        young_deaths: deque[float] = deque()
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = trio.current_time()
            code = await self._run_one(place, lifeline)
            now = trio.current_time()
            if code == WRONG_SETTINGS and not self._came_up:
                self._give_up()
                return
            if now - began >= YOUNG_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            else:
                young_deaths.append(now)
                while young_deaths[0] < now - YOUNG_DEATHS_WINDOW_SECONDS:
                    young_deaths.popleft()
                if len(young_deaths) >= MAX_YOUNG_DEATHS:
                    log.critical("giving_up", deaths=len(young_deaths))
                    self._give_up()
                    return
            await trio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    async def _run_one(self, place: int, lifeline: int) -> int | None:
        """From a worker's start to its death: its exit status, None where it did not start.

        Where it was replaced, its successor's.
        """
        began = trio.current_time()
        try:
            started = self._start(lifeline)
        except OSError as error:  # no memory or no process left just now
            log.error("worker_not_started", exc_info=error)
            return None
        while True:
            worker, status = started
            self._workers[place] = worker
            async with status:
                if not self._serving[place]:
                    with trio.move_on_after(READY_SECONDS):
                        self._serving[place] = bool(await status.receive_some(1))
                if self._serving[place]:
                    self._notice_change()
                    await status.receive_some(1)  # nothing comes but the end
            worker.kill()  # it is gone, or hung before it was ready
            code = worker.wait()
            self._forget(worker)
            seconds = round(trio.current_time() - began, 3)
            successor, self._successors[place] = self._successors[place], None
            if successor is None:
                self._workers[place], self._serving[place] = None, False
                log.error("worker_died", pid=worker.pid, status=code, seconds=seconds)
                return code
            log.info("worker_retired", pid=worker.pid, status=code, seconds=seconds)
            started, began = successor, trio.current_time()

    async def _serve_rolls(self, lifeline: int) -> None:
        while True:
            await self._rolling.wait()
            self._rolling = trio.Event()
            for place in range(len(self._workers)):
                if (reason := await self._replace(place, lifeline)) is not None:
                    log.error("roll_stopped", reason=reason)  # the old ones go on
                    break
            else:
                log.info("rolled")

    async def _replace(self, place: int, lifeline: int) -> str | None:
        """Start a worker, and once it serves retire the one in that place; or why it does not.

        A successor that dies while the old one drains is noticed when that has ended.
        """
        old = self._workers[place]
        if old is None or not self._serving[place]:
            return None  # it is being replaced anyway
        try:
            successor = self._start(lifeline, "--successor")
        except OSError as error:
            log.error("worker_not_started", exc_info=error)
            return "no process could be started"
        said: bytes | None = None
        code: int | None = None
        try:
            with trio.move_on_after(READY_SECONDS):
                said = await successor.status.receive_some(MAX_REASON_BYTES)
        finally:
            if said != READY or self._workers[place] is not old:
                if said != b"":  # else it is ending by itself, and its exit status says how
                    successor.worker.kill()
                code = successor.worker.wait()
                self._forget(successor.worker)
                await trio.aclose_forcefully(successor.status)
        if said is None:
            return f"the new worker said nothing for {READY_SECONDS:g} s"
        if said != READY:
            return said.decode("utf-8", "replace") or _why_ended(code)
        if self._workers[place] is not old:
            return "the old worker ended meanwhile"
        self._successors[place] = successor
        old.send_signal(signal.SIGUSR1)
        with trio.move_on_after(self._end_seconds):
            while self._workers[place] is old:  # noqa: ASYNC110 - a few times in a roll
                await trio.sleep(POLL_SECONDS)
        if self._workers[place] is old:
            old.kill()
        return None

    def _notice_change(self) -> None:
        if not all(self._serving):
            return
        if self._came_up:
            log.info("worker_replaced")
            if self._on_change is not None:
                self._on_change()
        self._came_up = True
        self._settled.set()

    def _start(self, lifeline: int, *arguments: str) -> "_Started":
        status, worker_end = os.pipe()
        number = next(n for n in itertools.count() if n not in self._numbers.values())
        env, inherited = self._env, [self._sock.fileno(), worker_end]
        if self._metrics is not None:
            env = env | {FOLDER: str(self._metrics.path), NUMBER: str(number)}
            inherited.append(self._metrics.lock)
        try:
            # Popen itself, not Trio's: that one forks in a thread, and is slower for nothing.
            worker = subprocess.Popen(
                [
                    # -P: not from the folder that we happen to be in.
                    *(sys.executable, "-P", "-m", "server.engine.worker"),
                    *("--fd", str(self._sock.fileno()), "--ready-fd", str(worker_end)),
                    *self._arguments,
                    *arguments,
                ],
                stdin=lifeline,
                env=env,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C at the terminal is for us, who end it in order
            )
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(worker_end)
        self._numbers[worker.pid] = number
        return _Started(worker, trio.lowlevel.FdStream(status))

    def _forget(self, worker: subprocess.Popen[bytes]) -> None:
        """Take what a dead worker was out of the metrics, and keep what it has counted."""
        number = self._numbers.pop(worker.pid)
        if self._metrics is not None:
            folder = str(self._metrics.path)
            multiprocess.mark_process_dead(number, folder)  # type: ignore[no-untyped-call]

    def _living(self) -> list[subprocess.Popen[bytes]]:
        successors = [started.worker for started in self._successors if started is not None]
        return [worker for worker in self._workers if worker is not None] + successors

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._living():
            worker.send_signal(number)

    async def _end_workers(self) -> None:
        """SIGTERM, and SIGKILL to who is still there after the drain."""
        # From here on it is open as long as a worker accepts. After that, nobody must be let in
        # only to wait for our own end.
        self._sock.close()
        self._signal(signal.SIGTERM)
        deadline = trio.current_time() + self._end_seconds
        while any(worker.poll() is None for worker in self._living()):
            if self._hurry or trio.current_time() > deadline:
                log.warning("workers_killed")
                self._signal(signal.SIGKILL)
                break
            await trio.sleep(POLL_SECONDS)
        for worker in self._living():
            worker.wait()
        self._workers = [None] * len(self._workers)
        self._successors = [None] * len(self._workers)


class _Started(NamedTuple):
    worker: subprocess.Popen[bytes]
    status: trio.lowlevel.FdStream


def _why_ended(code: int | None) -> str:
    if code == WRONG_SETTINGS:
        return "the new worker refuses its settings: the lines before name them"
    return f"the new worker ended with status {code}: the lines before say why"
