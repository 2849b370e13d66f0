"""What was sent, what was answered, what was shown, what is stored: and whether that is right.

Everything here is plain data and pure functions. A campaign fills a `Ledger`; `check` compares it
with the rows of PostgreSQL. No fault excuses anything; only the time in which a message must have
been shown stands still while one lasts.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

PAGE = 50
"""The newest messages that a stream without a cursor begins with."""
SEEN_SECONDS = 6.0
"""From the acknowledgment to every stream that is there: what the fast path lost is looked for
every four seconds, and a machine that starts servers meanwhile is slow."""
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
        cursor: the number that it began after; None: it had none.
    """

    channel_id: int
    person: str
    sessions: list[Session] = []
    caught_up: bool = False
    cursor: int | None = None


class Stored(msgspec.Struct, array_like=True):
    """A row of PostgreSQL."""

    seq: int
    message_id: str
    key: str


class Ledger(msgspec.Struct):
    """Everything that the clients saw.

    Attributes:
        troubles: when something was broken, (began, mended) each, in any order.
        ended: when everybody was sent home; 0: not yet.
    """

    sends: list[Send] = []
    readers: list[Reader] = []
    troubles: list[tuple[float, float]] = []
    ended: float = 0.0

    @property
    def deliveries(self) -> int:
        return sum(len(session.shown) for reader in self.readers for session in reader.sessions)


class Violation(NamedTuple):
    """A broken promise.

    Attributes:
        kind: lost, late (a stream was there and was not shown it in time), doubled, reordered,
            leaked, refused (and stored all the same), forged (nobody sent it).
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
    first = {
        send.key: min((each.at for each in send.attempts), default=math.inf)
        for send in ledger.sends
    }
    return [
        *_check_rows(stored),
        *_check_sends(ledger.sends, stored),
        *(wrong for reader in ledger.readers for wrong in _check_reader(reader, stored, first)),
        *_check_times(ledger, stored),
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


def _check_reader(
    reader: Reader, stored: Mapping[int, Sequence[Stored]], sent: Mapping[str, float]
) -> Iterator[Violation]:
    """
    Args:
        sent: of keys: when the first attempt was made.
    """
    rows = stored.get(reader.channel_id, ())
    last = reader.cursor
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
            if last is None and not _may_begin(shown, rows, sent):
                yield Violation("lost", where, f"began at {shown.seq}, with less than a page")
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


def _may_begin(shown: Shown, rows: Sequence[Stored], sent: Mapping[str, float]) -> bool:
    """Whether what a stream without a cursor is shown may begin here: at the first message of
    all, or a full page before one that somebody had sent by then."""
    newest = shown.seq + PAGE - 1
    if shown.seq <= 1:
        return True
    return newest <= len(rows) and sent.get(rows[newest - 1].key, math.inf) <= shown.at


class Wait(NamedTuple):
    """A message and a stream that was there, or came, after its acknowledgment.

    Attributes:
        connection: of the reader, which one.
        since: when both were there.
        seconds: from then until it was shown, or until the connection was over; those in which
            something was broken are not counted.
        shown: on this connection.
    """

    reader: Reader
    connection: int
    seq: int
    since: float
    seconds: float
    shown: bool

    @property
    def late(self) -> bool:
        return self.seconds > SEEN_SECONDS


def waits(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> Iterator[Wait]:
    """Of every acknowledged message and every stream that it was owed to."""
    untroubled = _Untroubled(ledger.troubles)
    acknowledged = {
        send.key: min((each.at + each.took for each in send.acknowledged), default=math.inf)
        for send in ledger.sends
    }
    times = {
        channel_id: [acknowledged.get(row.key, math.inf) for row in rows]
        for channel_id, rows in stored.items()
    }
    for reader in ledger.readers:
        known = times.get(reader.channel_id, [])
        soonest = list(accumulate(reversed(known), min))[::-1]
        """Of each and all after it: numbers are given in nearly the order of their times."""
        for number, session in enumerate(reader.sessions):
            if not session.live:
                continue
            ended = session.ended or ledger.ended
            seen = {shown.seq: shown.at for shown in session.shown}
            for seq in range(_owed_from(session, len(known)), len(known) + 1):
                if soonest[seq - 1] >= ended:
                    break
                since = max(known[seq - 1], session.live)
                if since < ended:
                    seconds = untroubled.between(since, seen.get(seq, ended))
                    yield Wait(reader, number, seq, since, seconds, seq in seen)


def _owed_from(session: Session, count: int) -> int:
    """The first number of `count` that a connection is owed."""
    if session.resets:
        after = session.shown[session.resets[-1] :]
        return after[0].seq if after else count + 1
    if session.cursor is not None:
        return session.cursor + 1
    return session.shown[0].seq if session.shown else max(1, count - PAGE + 1)


def _check_times(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> Iterator[Violation]:
    for wait in waits(ledger, stored):
        if wait.late:
            reader = wait.reader
            where = f"channel {reader.channel_id}, {reader.person}, connection {wait.connection}"
            how = "shown after" if wait.shown else "not shown for"
            yield Violation(
                "late",
                where,
                f"{wait.seq}, there at {wait.since:.1f} s, was {how} {wait.seconds:.1f} s",
            )


class _Untroubled:
    """Measures time, and stands still while something is broken."""

    def __init__(self, troubles: Sequence[tuple[float, float]]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._before: list[float] = []
        """Of each: the troubled seconds before it."""
        for began, ended in sorted(troubles):
            if self._ends and began <= self._ends[-1]:
                self._ends[-1] = max(ended, self._ends[-1])
            else:
                past = self._ends[-1] - self._begins[-1] + self._before[-1] if self._ends else 0.0
                self._begins.append(began)
                self._ends.append(ended)
                self._before.append(past)

    def between(self, begin: float, end: float) -> float:
        return max(0.0, self._at(end) - self._at(begin))

    def _at(self, time: float) -> float:
        last = bisect_right(self._begins, time) - 1
        if last < 0:
            return time
        return time - self._before[last] - (min(time, self._ends[last]) - self._begins[last])
