"""A circuit breaker: while a dependency is down, calls skip it at once.

Nothing here awaits or reads a clock of its own. One table says what moves a breaker on.
"""

import time
from collections.abc import Callable
from enum import Enum, auto

import trio

from storage.contract import StoreUnavailable


class State(Enum):
    CLOSED = auto()
    """Calls go through."""
    OPEN = auto()
    """Calls fail at once."""
    HALF_OPEN = auto()
    """One probe is under way; calls still fail at once."""


class Event(Enum):
    SUCCEEDED = auto()
    FAILED = auto()
    """Too slow, or broken off: it may have been that call alone."""
    REFUSED = auto()
    """Nobody listens: no need to ask twice."""
    DENIED = auto()
    """It answers, and does not let us do what we must: only somebody's hand changes that."""
    PROBING = auto()


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.CLOSED, Event.FAILED): State.OPEN,  # after `tolerance` in a row
    (State.CLOSED, Event.REFUSED): State.OPEN,
    (State.CLOSED, Event.DENIED): State.OPEN,
    (State.OPEN, Event.PROBING): State.HALF_OPEN,
    (State.HALF_OPEN, Event.SUCCEEDED): State.CLOSED,
    (State.HALF_OPEN, Event.FAILED): State.OPEN,
    (State.HALF_OPEN, Event.REFUSED): State.OPEN,
    (State.HALF_OPEN, Event.DENIED): State.OPEN,
}
"""Every other pair leaves the state as it is: an answer that arrives late proves nothing."""


class Breaker:
    """One dependency's breaker.

    Args:
        name: of the dependency, for logs and metrics.
        tolerance: failures in a row that open it.
        on_change: called with this breaker after each change between up and down.
    """

    def __init__(
        self, name: str, *, tolerance: int, on_change: Callable[["Breaker"], None]
    ) -> None:
        self.name = name
        self.state = State.CLOSED
        self.since = time.time()
        """When it last went between up and down, in seconds since the epoch."""
        self.opened = trio.Event()
        """Set while it is not closed."""
        self.on_suspect: Callable[[], None] = lambda: None
        """Called at each failure while it is closed: something may be amiss already. Plain."""
        self.held = False
        """Whether something is denied that no probe asks for (the feed's subscriptions): then it
        stays open when a probe succeeds."""
        self._denied = False
        self._tolerance = tolerance
        self._failures = 0
        self._on_change = on_change

    @property
    def up(self) -> bool:
        return self.state is State.CLOSED

    @property
    def denied(self) -> bool:
        """Whether it is open since something was denied: it need not be asked often."""
        return self._denied or self.held

    @property
    def suspect(self) -> bool:
        """The last that was heard of it was a failure."""
        return self._failures > 0 or not self.up

    def check(self) -> None:
        """Raises:
        StoreUnavailable: the dependency is known to be down.
        """
        if self.state is not State.CLOSED:
            raise StoreUnavailable

    def record(self, event: Event) -> None:
        if event is not Event.PROBING:
            self._denied = event is Event.DENIED
        if event is Event.SUCCEEDED:
            self._failures = 0
        elif event is Event.FAILED and self.state is State.CLOSED:
            self._failures += 1
            self.on_suspect()
            if self._failures < self._tolerance:
                return
        new = TRANSITIONS.get((self.state, event))
        if new is None:
            return
        if new is State.CLOSED and self.held:
            new = State.OPEN
        was_up, self.state = self.up, new
        if self.up != was_up:
            self._failures = 0
            self.since = time.time()
            if self.up:
                self.opened = trio.Event()
            else:
                self.opened.set()
            self._on_change(self)
