"""What was sent, what was answered, what was shown, what is stored: and whether that is right.

Everything here is plain data and pure functions. A campaign fills a `Ledger`; `check` compares it
with the rows of PostgreSQL, and knows nothing of faults: no fault excuses anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

UNKNOWN = 0
"""The status of an attempt that was never answered: its connection broke, or its time was over."""


class Attempt(msgspec.Struct, array_like=True):
    """One POST.

    Attributes:
        at: seconds since the campaign began.
        took: seconds to the answer, or until it was given up.
        status: of HTTP, or `UNKNOWN`.
        node: which server it was sent to.
        seq, message_id: of a 200.
    """

    at: float
    took: float
    status: int
    node: int
    seq: int = 0
    message_id: str = ""


class Send(msgspec.Struct):
    """One message that somebody wanted to send, under one client message id.

    Attributes:
        author: of the campaign's people.
        attempts: in no order: some go to two servers at the same time.
    """

    channel_id: int
    author: str
    key: str
    attempts: list[Attempt] = []

    @property
    def acknowledged(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.status == 200]

    @property
    def refused(self) -> bool:
        """Nothing but a 4xx was ever said of it: it must not be stored. A 503 says nothing."""
        return bool(self.attempts) and all(400 <= each.status < 500 for each in self.attempts)


class Shown(msgspec.Struct, array_like=True):
    """A message as a stream showed it."""

    at: float
    channel_id: int
    seq: int
    message_id: str
    key: str


class Session(msgspec.Struct):
    """One connection of a stream.

    Attributes:
        cursor: the last number that its client had; None where it had none.
        opened, live, ended: when it was begun, when `connected` came (0: never), when it was over.
        resets: how many of `shown` had come when a `reset` did, each time.
    """

    node: int
    cursor: int | None
    opened: float
    live: float = 0.0
    ended: float = 0.0
    shown: list[Shown] = []
    resets: list[int] = []


class Reader(msgspec.Struct):
    """One person's stream, over any number of connections.

    Attributes:
        caught_up: it was online at the end: it must have seen all there is.
    """

    channel_id: int
    person: str
    sessions: list[Session] = []
    caught_up: bool = False


class Stored(msgspec.Struct, array_like=True):
    """A row of PostgreSQL."""

    seq: int
    message_id: str
    key: str


class Ledger(msgspec.Struct):
    """Everything that the clients saw."""

    sends: list[Send] = []
    readers: list[Reader] = []

    @property
    def deliveries(self) -> int:
        return sum(len(session.shown) for reader in self.readers for session in reader.sessions)


class Violation(NamedTuple):
    """A broken promise.

    Attributes:
        kind: lost, doubled, reordered, leaked, refused (and stored all the same), forged
            (nobody sent it).
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


def check(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> list[Violation]:
    """Every broken promise that the record shows.

    Args:
        stored: each channel's rows, in the order of their numbers.
    """
    return [
        *_check_rows(stored),
        *_check_sends(ledger.sends, stored),
        *(wrong for reader in ledger.readers for wrong in _check_reader(reader, stored)),
    ]


def _check_rows(stored: Mapping[int, Sequence[Stored]]) -> Iterator[Violation]:
    """Numbers without holes; no message, and no client message id, twice."""
    seen: set[str] = set()
    for channel_id, rows in stored.items():
        where = f"channel {channel_id}"
        if [row.seq for row in rows] != list(range(1, len(rows) + 1)):
            yield Violation("lost", where, "its numbers have holes")
        for row in rows:
            for name in (row.message_id, row.key):
                if name in seen:
                    yield Violation("doubled", where, f"{name} is stored twice")
                if name:
                    seen.add(name)


def _check_sends(
    sends: Sequence[Send], stored: Mapping[int, Sequence[Stored]]
) -> Iterator[Violation]:
    rows = {row.key: (channel_id, row) for channel_id, found in stored.items() for row in found}
    for send in sends:
        where = f"channel {send.channel_id}, {send.key}"
        told = {(attempt.seq, attempt.message_id) for attempt in send.acknowledged}
        if len(told) > 1:
            yield Violation("doubled", where, "acknowledged as two messages")
        channel_id, row = rows.get(send.key, (0, None))
        if told:
            seq, message_id = next(iter(told))
            if row is None:
                yield Violation("lost", where, f"acknowledged as {seq}, and not stored")
            elif (channel_id, row.seq, row.message_id) != (send.channel_id, seq, message_id):
                yield Violation("lost", where, f"acknowledged as {seq}, and stored otherwise")
        elif send.refused and row is not None:
            yield Violation("refused", where, "never accepted, and stored")
    known = {send.key for send in sends}
    for key, (channel_id, _) in rows.items():
        if key not in known:
            yield Violation("forged", f"channel {channel_id}", f"nobody sent {key}")


def _check_reader(reader: Reader, stored: Mapping[int, Sequence[Stored]]) -> Iterator[Violation]:
    rows = stored.get(reader.channel_id, ())
    last: int | None = None
    for number, session in enumerate(reader.sessions):
        where = f"channel {reader.channel_id}, {reader.person}, connection {number}"
        if session.cursor != last:
            yield Violation("lost", where, "resumed from elsewhere than it had come to")
        last = session.cursor
        for index, shown in enumerate(session.shown):
            if index in session.resets:
                last = None
            if shown.channel_id != reader.channel_id:
                yield Violation("leaked", where, f"a message of channel {shown.channel_id}")
                continue
            if last is not None and shown.seq != last + 1:
                yield _out_of_step(where, shown.seq, last)
            last = shown.seq
            row = rows[shown.seq - 1] if 0 < shown.seq <= len(rows) else None
            if row is None:
                yield Violation("forged", where, f"showed {shown.seq}, which is not stored")
            elif (row.message_id, row.key) != (shown.message_id, shown.key):
                yield Violation("leaked", where, f"{shown.seq} came with another message")
        if len(session.shown) in session.resets:
            last = None
    if reader.caught_up and rows and last != rows[-1].seq:
        where = f"channel {reader.channel_id}, {reader.person}"
        yield Violation("lost", where, f"was online at the end and saw {last} of {rows[-1].seq}")


def _out_of_step(where: str, seq: int, last: int) -> Violation:
    if seq == last:
        return Violation("doubled", where, f"showed {seq} twice")
    if seq < last:
        return Violation("reordered", where, f"showed {seq} after {last}")
    return Violation("lost", where, f"showed {seq} after {last}: {seq - last - 1} are missing")
