"""What was sent, what was answered, what was shown, what is stored: and whether that is right.

Everything here is plain data and pure functions. A campaign fills a `Ledger`; `check` compares it
with the rows of PostgreSQL. No fault excuses anything; only the time in which a message must have
been shown stands still while one lasts.

Where the database is put back to an earlier point, an era ends. Each era is checked against the
rows of its own: what was acknowledged too late to be in the backup is gone with its era, all else
is in the next one as it was, and no stream of the next one shows anything but its own.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
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
        allowed: nothing is wrong with it: it must not be refused.
    """

    channel_id: int
    author: str
    key: str
    attempts: list[Attempt] = []
    allowed: bool = True

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
    epoch: int = 0


class Session(msgspec.Struct):
    """One connection of a stream.

    Attributes:
        cursor: the last number that its client had; None where it had none.
        epoch: the cursor's.
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
    epoch: int = 0


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


class Era(msgspec.Struct):
    """One that is over: the database was put back to an earlier point.

    Attributes:
        kept_until: what was acknowledged by then is in the next one too.
        ended: no server ran then.
        stored: its rows, at its end.
    """

    epoch: int
    kept_until: float
    ended: float
    stored: Mapping[int, Sequence[Stored]]


class Ledger(msgspec.Struct):
    """Everything that the clients saw.

    Attributes:
        troubles: when something was broken, (began, mended) each, in any order.
        ended: when everybody was sent home; 0: not yet.
        past: the eras that are over, in their order.
        epoch: of the present one.
    """

    sends: list[Send] = []
    readers: list[Reader] = []
    troubles: list[tuple[float, float]] = []
    ended: float = 0.0
    past: list[Era] = []
    epoch: int = 0

    @property
    def deliveries(self) -> int:
        return sum(len(session.shown) for reader in self.readers for session in reader.sessions)


class Violation(NamedTuple):
    """A broken promise.

    Attributes:
        kind: lost, late (a stream was there and was not shown it in time), doubled, reordered,
            leaked, refused (and stored all the same), wronged (refused, and nothing was wrong with
            it), forged (nobody sent it).
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


def check(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> list[Violation]:
    """Every broken promise that the record shows.

    Args:
        stored: each channel's rows, in the order of their numbers; of the present era.
    """
    first = {
        send.key: min((each.at for each in send.attempts), default=math.inf)
        for send in ledger.sends
    }
    violations: list[Violation] = []
    for part, rows in _eras(ledger, stored):
        violations += _check_rows(rows)
        violations += _check_sends(part.sends, rows)
        for reader in part.readers:
            violations += _check_reader(reader, rows, first)
            violations += _check_epochs(reader, part)
        violations += _check_times(part, rows)
    acknowledged = _acknowledged(ledger.sends)
    for era, following in pairwise((*ledger.past, None)):
        assert era is not None
        rows = following.stored if following else stored
        violations += _check_kept(era, rows, acknowledged)
    return violations


def taken_back(ledger: Ledger) -> int:
    """Acknowledged messages that the next era may be without: of the time after its backup."""
    times = _acknowledged(ledger.sends)
    return sum(
        era.kept_until < times.get(row.key, math.inf) <= era.ended
        for era in ledger.past
        for rows in era.stored.values()
        for row in rows
    )


def _eras(
    ledger: Ledger, stored: Mapping[int, Sequence[Stored]]
) -> Iterator[tuple[Ledger, Mapping[int, Sequence[Stored]]]]:
    """The ledger cut where eras end, by when attempts and connections were begun; with the rows
    of each. All sends are in each part, for rows live on from one era to the next."""
    if not ledger.past:
        yield ledger, stored
        return
    now = Era(ledger.epoch, math.inf, math.inf, stored)
    began = -math.inf
    for era in (*ledger.past, now):
        sends = [
            msgspec.structs.replace(
                send, attempts=[each for each in send.attempts if began <= each.at < era.ended]
            )
            for send in ledger.sends
        ]
        readers = []
        for reader in ledger.readers:
            sessions = [each for each in reader.sessions if began <= each.opened < era.ended]
            cursor = reader.cursor if sessions == reader.sessions[: len(sessions)] else None
            if sessions and sessions[0] is not reader.sessions[0]:
                cursor = sessions[0].cursor
            readers.append(
                Reader(
                    reader.channel_id,
                    reader.person,
                    sessions,
                    caught_up=reader.caught_up and era is now,
                    cursor=cursor,
                )
            )
        ended = ledger.ended if era is now else era.ended
        yield Ledger(sends, readers, ledger.troubles, ended, epoch=era.epoch), era.stored
        began = era.ended


def _acknowledged(sends: Sequence[Send]) -> dict[str, float]:
    """Of keys: when it was first said."""
    return {
        send.key: min((each.at + each.took for each in send.acknowledged), default=math.inf)
        for send in sends
    }


def _check_kept(
    era: Era, following: Mapping[int, Sequence[Stored]], acknowledged: Mapping[str, float]
) -> Iterator[Violation]:
    """What was acknowledged before the backup is in the next era, as it was."""
    for channel_id, rows in era.stored.items():
        after = following.get(channel_id, ())
        for index, row in enumerate(rows):
            if acknowledged.get(row.key, math.inf) <= era.kept_until and (
                index >= len(after) or after[index] != row
            ):
                yield Violation("lost", f"channel {channel_id}", f"{row.seq} was in the backup")


def _check_epochs(reader: Reader, era: Ledger) -> Iterator[Violation]:
    """A stream shows its own era alone, and whoever comes from another one is told."""
    for session in reader.sessions:
        where = f"channel {reader.channel_id}, {reader.person}, from {session.opened:.1f} s"
        if any(shown.epoch != era.epoch for shown in session.shown):
            yield Violation("leaked", where, "showed a message of another era")
        if session.cursor is None or session.epoch == era.epoch or 0 in session.resets:
            continue
        ended = session.ended or era.ended
        if session.shown or (session.live and ended - session.live > SEEN_SECONDS):
            yield Violation("lost", where, "came with a cursor of another era, and was not told")


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
        if send.allowed and any(400 <= each.status < 500 for each in send.attempts):
            statuses = sorted({each.status for each in send.attempts})
            yield Violation("wronged", where, f"allowed, and answered with {statuses}")
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
    for part, rows in _eras(ledger, stored):
        yield from _waits(part, rows)


def _waits(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> Iterator[Wait]:
    """The same of one era."""
    untroubled = _Untroubled(ledger.troubles)
    acknowledged = _acknowledged(ledger.sends)
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
            for seq in range(_owed_from(session, ledger.epoch, len(known)), len(known) + 1):
                if soonest[seq - 1] >= ended:
                    break
                since = max(known[seq - 1], session.live)
                if since < ended:
                    seconds = untroubled.between(since, seen.get(seq, ended))
                    yield Wait(reader, number, seq, since, seconds, seq in seen)


def _owed_from(session: Session, epoch: int, count: int) -> int:
    """The first number of `count` that a connection is owed."""
    if session.resets:
        after = session.shown[session.resets[-1] :]
        return after[0].seq if after else count + 1
    if session.cursor is not None:
        return session.cursor + 1 if session.epoch == epoch else count + 1
    return session.shown[0].seq if session.shown else max(1, count - PAGE + 1)


def _check_times(ledger: Ledger, stored: Mapping[int, Sequence[Stored]]) -> Iterator[Violation]:
    for wait in _waits(ledger, stored):
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
