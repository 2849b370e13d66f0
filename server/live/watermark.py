"""What one stream has been given, and how live frames join what is replayed to it.

Nothing here awaits or does I/O. A stream's states, and what moves it on, are the one table
below; the rest is comparing integers.
"""

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol, TypeVar

from protocol.frames import Frame, join_frames


class State(Enum):
    BEHIND = auto()
    """Reading from the store; live frames gather."""
    LIVE = auto()
    """Given each frame as it comes."""
    ENDED = auto()
    """Given nothing more."""


class Event(Enum):
    CAUGHT_UP = auto()
    GAP = auto()
    END = auto()


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.BEHIND, Event.CAUGHT_UP): State.LIVE,
    (State.LIVE, Event.GAP): State.BEHIND,
    (State.BEHIND, Event.END): State.ENDED,
    (State.LIVE, Event.END): State.ENDED,
}
"""Every other pair leaves the state as it is."""

MAX_GATHERED = 128
"""Live frames kept for a stream that is behind; the oldest go, and are read from the store."""


class Message(Protocol):
    """A `Frame`, or a stored record."""

    @property
    def seq(self) -> int: ...


M = TypeVar("M", bound=Message)


class Watermark:
    """The highest sequence number given to one stream: never less, each number once.

    Attributes:
        seq: given up to here, without holes since the cursor.
    """

    __slots__ = ("_gathered", "seq", "state")

    def __init__(self, seq: int = 0) -> None:
        self.seq = seq
        self.state = State.BEHIND
        self._gathered: deque[Frame] | None = None  # None while there is none: it weighs 600 B

    def offer(self, frame: Frame) -> Frame | None:
        """What of this live frame to hand on now. If nothing it was given before, it is kept,
        or the stream has fallen behind (its state says so)."""
        if self.state is State.LIVE:
            if frame.first == self.seq + 1:
                self.seq = frame.seq
                return frame
            if frame.seq <= self.seq:
                return None
            if frame.first <= self.seq:  # it has read further than others of its channel
                due = [part for part in frame.parts if part.seq > self.seq]
                self.seq = frame.seq
                return join_frames(due)
            self.move(Event.GAP)
        if self.state is State.BEHIND:
            if self._gathered is None:
                self._gathered = deque(maxlen=MAX_GATHERED)
            self._gathered.extend(frame.parts or (frame,))
        return None

    def replay(self, messages: Iterable[M]) -> list[M]:
        """Of messages read from the store in order, those that are due."""
        due = [message for message in messages if message.seq > self.seq]
        if due and self.state is not State.ENDED:
            self.seq = due[-1].seq
            return due
        return []

    def join(self, head: int) -> list[Frame]:
        """Take what gathered, and go live if that reaches `head`, the newest number that any
        stream of the channel was given. Whatever does not fit is in the store by now."""
        gathered, self._gathered = self._gathered or (), None
        due: list[Frame] = []
        for frame in gathered:
            if frame.seq == self.seq + 1:
                self.seq = frame.seq
                due.append(frame)
            elif frame.seq > self.seq:
                return due
        if self.seq >= head:
            self.move(Event.CAUGHT_UP)
        return due

    def move(self, event: Event) -> None:
        self.state = TRANSITIONS.get((self.state, event), self.state)
        if self.state is State.ENDED:
            self._gathered = None
