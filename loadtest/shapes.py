"""How many users there are, and what happens to them."""

import os
import signal
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
from locust import LoadTestShape

from loadtest.local import Ready
from loadtest.objectives import Objective, judge, read_objectives
from loadtest.plugin import DROP, recorder_of
from loadtest.recorder import Recorder

RUN_SECONDS = 120.0
HERD_SECONDS = 3.0
DAY = (
    0.05, 0.03, 0.02, 0.02, 0.02, 0.04, 0.10, 0.25, 0.55, 0.85, 1.00, 0.95,
    0.70, 0.75, 0.95, 1.00, 0.95, 0.85, 0.70, 0.60, 0.50, 0.35, 0.20, 0.10,
)  # fmt: skip
"""Share of the most users in each hour of a working day. An assumption, as a plan would make it."""
DAY_STEPS = 96
"""Quarters of an hour."""


class Hold(LoadTestShape):
    """Ramps to `--users` and holds them, until `--run-time` is over."""

    use_common_options = True

    @property
    def recorder(self) -> Recorder:
        assert self.runner is not None
        return recorder_of(self.runner.environment)

    @property
    def users(self) -> int:
        return int(self._option("num_users") or 1)

    @property
    def spawn_rate(self) -> float:
        return float(self._option("spawn_rate") or 1.0)

    @property
    def seconds(self) -> float:
        return float(self._option("run_time") or RUN_SECONDS)

    def tick(self) -> tuple[int, float] | None:
        if self.get_run_time() >= self.seconds:
            return None
        return self.now(self.get_run_time())

    def now(self, at: float) -> tuple[int, float]:
        """How many users there are, and how many more or fewer a second.

        Args:
            at: seconds since the beginning.
        """
        del at
        return self.users, self.spawn_rate

    def _option(self, name: str) -> float | None:
        assert self.runner is not None
        value: float | None = getattr(self.runner.environment.parsed_options, name)
        return value


class Herd(Hold):
    """Holds them, and every `--herd-every` seconds everybody drops and is back within three."""

    herds = 0

    def reset_time(self) -> None:
        super().reset_time()
        self.herds = 0

    def now(self, at: float) -> tuple[int, float]:
        every = self._option("herd_every") or 30.0
        if at // every > self.herds and at < self.seconds - HERD_SECONDS:
            self.herds += 1
            self.recorder.mark("everybody drops")
            assert self.runner is not None
            self.runner.send_message(DROP, {"return_within": HERD_SECONDS})
        return super().now(at)


class WorkingDay(Hold):
    """Twenty-four hours in `--run-time`; `--users` are those of the busiest."""

    def now(self, at: float) -> tuple[int, float]:
        quarter = int(DAY_STEPS * at / self.seconds) % DAY_STEPS
        hour, rest = divmod(quarter, 4)
        share = DAY[hour] + (DAY[(hour + 1) % 24] - DAY[hour]) * rest / 4
        return max(1, round(share * self.users)), self.spawn_rate


class RedisKilled(Hold):
    """Holds them, and kills the server's Redis in the middle. It stays dead."""

    killed = False

    def reset_time(self) -> None:
        super().reset_time()
        self.killed = False

    def now(self, at: float) -> tuple[int, float]:
        if not self.killed and at >= self.seconds / 2:
            self.killed = True
            assert self.runner is not None
            ready = Ready.read(self.runner.environment.parsed_options.server_ready)
            redis = psutil.Process(ready.pids.redis)
            assert "valkey" in redis.name(), "that process is no Redis of ours"
            os.kill(redis.pid, signal.SIGKILL)
            self.recorder.mark("Redis killed")
        return super().now(at)


class Steps(Hold):
    """Adds `--step-users` every `--step-seconds`, until an objective breaks or `--users` are
    there. The finding is the most that held."""

    _users = 0
    _until = 0.0
    _objectives: tuple[Objective, ...] = ()

    def reset_time(self) -> None:
        super().reset_time()
        self._users, self._until = 0, 0.0
        if self.runner is not None:
            file = Path(self.runner.environment.parsed_options.objectives)
            self._objectives = tuple(read_objectives(file, ""))

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        at, step = time.monotonic(), int(self._option("step_users") or 1000)
        recorder = self.recorder
        if self._users == 0:
            recorder.held_users = 0
        elif at < self._until or (recorder.open < self._users * 0.999 and at < self._until + 60):
            return self._users, self.spawn_rate
        else:
            verdict = judge(self._objectives, recorder.lately())
            if verdict.missed:
                why = ", ".join(f"not {each.objective}" for each in verdict.missed)
                if verdict.generator:
                    why += f"; the generator was the limit: {verdict.generator}"
                recorder.mark(f"{self._users} users: {why}")
                return None
            recorder.held_users = self._users
            recorder.mark(f"{self._users} users held")
            if self._users >= self.users:
                return None
        recorder.look_again()
        self._users = min(self.users, self._users + step)
        self._until = at + step / self.spawn_rate + (self._option("step_seconds") or 30.0)
        return self._users, self.spawn_rate
