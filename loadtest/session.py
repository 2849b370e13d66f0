"""What one process with users has in common during one run: from `test_start` to `test_stop`."""

import random
import time
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import gevent
import psutil  # type: ignore[import-untyped,unused-ignore]
from gevent.pool import Group
from locust.env import Environment
from locust.exception import StopUser

from loadtest.figures import CPU, LAG, MEMORY, Figures
from loadtest.heartbeats import Listening
from loadtest.ledger import Ledger
from loadtest.listening import Listener
from loadtest.people import Seats, read_pairs
from loadtest.sending import Pacer
from loadtest.sse import Target

TICK_SECONDS = 1.0
LAG_SECONDS = 0.05
"""Between two looks at how late this process' own loop is."""
TRIES = 8
"""To find somebody who may be sent from, among all that listen."""


class Options(NamedTuple):
    """Ours, of Locust's command line; `loadtest/options.py` says what each is."""

    tokens: Path
    sends_per_stream: float
    heartbeat_seconds: float
    cut_every: float
    haste: float
    settle_seconds: float

    @classmethod
    def of(cls, parsed: Any) -> "Options":
        return cls(
            Path(parsed.tokens),
            float(parsed.sends_per_stream),
            float(parsed.heartbeat_seconds),
            float(parsed.cut_every),
            float(parsed.haste),
            float(parsed.settle_seconds),
        )


class Session:
    """
    Args:
        environment: Locust's.
        options: of the run.
        index, of: which process this is, and of how many.

    Raises:
        OSError, ValueError: there is no such server, or no such file of people.

    Attributes:
        quiet: nobody begins to send any more.
        open: streams that are open.
    """

    def __init__(
        self, environment: Environment, options: Options, *, index: int = 0, of: int = 1
    ) -> None:
        if not environment.host:
            raise ValueError("--host is missing")
        self.environment = environment
        self.url = environment.host
        self.options = options
        self.target = Target.of(environment.host)
        self.ledger = Ledger(settle_seconds=options.settle_seconds)
        self.figures = Figures(environment, self.ledger)
        self.seats = Seats(read_pairs(options.tokens, index=index, of=of))
        self.random = random.Random(index)
        self.quiet = False
        self._listeners: list[Listener] = []
        self._greenlets = Group()
        self._heartbeats = Listening(options.heartbeat_seconds, every=TICK_SECONDS)
        self.open = 0

    def start(self) -> None:
        self._greenlets.spawn(self._every_second)
        self._greenlets.spawn(self._watch_lag)
        if self.options.sends_per_stream:
            self._greenlets.spawn(Pacer(self, self.options.sends_per_stream).run)
        if self.options.cut_every:
            self._greenlets.spawn(self._cut_now_and_then)

    def drain(self) -> None:
        """Let nobody send any more, and wait until all that was sent must have been shown."""
        if self.quiet:
            return
        self.quiet = True
        deadline = time.monotonic() + self.ledger.settle_seconds + TICK_SECONDS
        while self.ledger.pending and time.monotonic() < deadline:
            gevent.sleep(0.1)
            self._settle()

    def stop(self) -> None:
        self._greenlets.kill()

    # Who listens

    def came(self, listener: Listener) -> None:
        listener.place = len(self._listeners)
        self._listeners.append(listener)

    def went(self, listener: Listener) -> None:
        """The last one takes its place: there may be thousands."""
        last = self._listeners.pop()
        if last is not listener:
            self._listeners[listener.place] = last
            last.place = listener.place

    def anybody(self) -> Listener | None:
        """Somebody who is online and may be sent from; None if hardly anybody is."""
        for _ in range(TRIES):
            if not self._listeners:
                return None
            listener = self.random.choice(self._listeners)
            if listener.sends and listener.online:
                return listener
        return None

    def drop_everybody(self, *, return_within: float) -> None:
        """A thundering herd: all lose their streams now, and come back within so many seconds."""
        for listener in tuple(self._listeners):
            listener.cut(return_within=return_within)

    # Once a second

    def _every_second(self) -> None:
        process = psutil.Process()
        at, spent = time.monotonic(), time.process_time()
        while True:
            gevent.sleep(TICK_SECONDS)
            now, spent_now = time.monotonic(), time.process_time()
            self.figures.gauge(CPU, 100 * (spent_now - spent) / (now - at))
            self.figures.gauge(MEMORY, process.memory_info().rss / 1e6)
            at, spent = now, spent_now
            self._settle()
            for listener in self._heartbeats.silent(self._listeners, now):
                self.figures.lost_heartbeat()
                listener.cut()

    def _settle(self) -> None:
        lost = self.ledger.settle(time.monotonic())
        self.figures.lost(lost, self.ledger.settle_seconds)

    def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_SECONDS
            gevent.sleep(LAG_SECONDS)
            self.figures.gauge(LAG, 1e3 * max(0.0, time.monotonic() - due))

    def _cut_now_and_then(self) -> None:
        """Each stream is lost after `cut_every` seconds on average."""
        while not self.quiet:
            gevent.sleep(TICK_SECONDS)
            count = self.open * TICK_SECONDS / self.options.cut_every
            for _ in range(int(count + self.random.random())):
                listener = self.anybody()
                if listener is not None:
                    listener.cut()


_sessions: WeakKeyDictionary[Environment, Session] = WeakKeyDictionary()


def session_of(environment: Environment) -> Session:
    """The run's in this process; there is one from `test_start` on.

    Raises:
        StopUser: it could not begin.
    """
    session = _sessions.get(environment)
    if session is None:
        raise StopUser
    return session


def find_session(environment: Environment) -> Session | None:
    return _sessions.get(environment)


def begin_session(session: Session) -> None:
    """In place of the one of an earlier run."""
    _sessions[session.environment] = session
    session.start()
