"""The checker is told the truth, and then every kind of lie."""

from collections.abc import Callable

import pytest

from bench.faults.ledger import (
    PAGE,
    SEEN_SECONDS,
    UNKNOWN,
    Attempt,
    Era,
    Ledger,
    Reader,
    Send,
    Session,
    Shown,
    Stored,
    check,
    taken_back,
    waits,
)

Stores = dict[int, list[Stored]]


def send(seq: int, *, channel_id: int = 1, status: int = 200) -> Send:
    told = (seq, f"m{channel_id}-{seq}") if status == 200 else (0, "")
    attempt = Attempt(1.0, 0.01, status, 0, *told)
    return Send(channel_id, "therapist", f"k{channel_id}-{seq}", [attempt])


def shown(seq: int, *, channel_id: int = 1) -> Shown:
    return Shown(1.0, channel_id, seq, f"m{channel_id}-{seq}", f"k{channel_id}-{seq}")


def truth() -> tuple[Ledger, Stores]:
    """Two channels of five messages; channel 1 has a reader who was cut after the third."""
    stored = {
        channel_id: [
            Stored(seq, f"m{channel_id}-{seq}", f"k{channel_id}-{seq}") for seq in range(1, 6)
        ]
        for channel_id in (1, 2)
    }
    reader = Reader(
        1,
        "prospect",
        [
            Session(0, None, 0.0, shown=[shown(1), shown(2), shown(3)]),
            Session(1, 3, 2.0, shown=[shown(4), shown(5)]),
        ],
        caught_up=True,
    )
    sends = [send(seq, channel_id=channel_id) for channel_id in (1, 2) for seq in range(1, 6)]
    return Ledger(sends, [reader]), stored


def test_the_truth_is_believed():
    assert check(*truth()) == []


def test_what_nobody_promised_is_no_violation():
    """Unknown and stored, unknown and not stored, refused and not stored; a reader who was away
    at the end, and one who was told to begin anew."""
    ledger, stored = truth()
    ledger.sends[4].attempts = [Attempt(1.0, 1.5, UNKNOWN, 0), Attempt(3.0, 1.5, 503, 1)]
    ledger.sends += [
        Send(1, "therapist", "never", [Attempt(1.0, 1.5, UNKNOWN, 0)]),
        Send(1, "therapist", "refused", [Attempt(1.0, 0.1, 403, 0)], allowed=False),
    ]
    ledger.readers += [
        Reader(1, "away", [Session(0, None, 0.0, shown=[shown(1), shown(2)])]),
        Reader(1, "reset", [Session(0, None, 0.0, shown=[shown(1), shown(1)], resets=[1])]),
        Reader(1, "reset and cut", [Session(0, None, 0.0, shown=[shown(1)], resets=[1])] * 2),
        Reader(1, "with a cursor", [Session(0, 3, 0.0, shown=[shown(4)])], cursor=3),
    ]
    assert check(ledger, stored) == []


def test_a_repeat_that_finds_its_message_is_no_violation():
    ledger, stored = truth()
    ledger.sends[0].attempts.insert(0, Attempt(0.5, 1.5, UNKNOWN, 1))
    ledger.sends[0].attempts.append(ledger.sends[0].attempts[-1])
    assert check(ledger, stored) == []


def lose_a_row(ledger: Ledger, stored: Stores) -> None:
    stored[2].pop()


def leave_a_hole(ledger: Ledger, stored: Stores) -> None:
    del stored[2][1], ledger.sends[6]


def store_twice(ledger: Ledger, stored: Stores) -> None:
    stored[2].append(Stored(6, "other", "k2-1"))


def acknowledge_twice(ledger: Ledger, stored: Stores) -> None:
    ledger.sends[0].attempts.append(Attempt(1.0, 0.01, 200, 1, 2, "m1-2"))


def acknowledge_another(ledger: Ledger, stored: Stores) -> None:
    ledger.sends[0].attempts[0].seq = 2


def store_what_was_refused(ledger: Ledger, stored: Stores) -> None:
    ledger.sends[9].attempts[0] = Attempt(1.0, 0.1, 409, 0)


def refuse_what_is_allowed(ledger: Ledger, stored: Stores) -> None:
    ledger.sends[0].attempts.insert(0, Attempt(0.5, 0.1, 401, 0))


def store_what_nobody_sent(ledger: Ledger, stored: Stores) -> None:
    ledger.sends.pop()


def skip_one(ledger: Ledger, stored: Stores) -> None:
    del ledger.readers[0].sessions[0].shown[1]


def skip_one_at_the_resume(ledger: Ledger, stored: Stores) -> None:
    del ledger.readers[0].sessions[1].shown[0]


def miss_the_last(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown.pop()


def forget_the_cursor(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].cursor = None


def begin_in_the_middle(ledger: Ledger, stored: Stores) -> None:
    ledger.readers.append(Reader(1, "fresh", [Session(0, None, 0.0, shown=[shown(4), shown(5)])]))


def begin_after_the_cursor(ledger: Ledger, stored: Stores) -> None:
    ledger.readers.append(Reader(1, "old", [Session(0, 2, 0.0, shown=[shown(4)])], cursor=2))


def show_twice(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[0].shown.insert(1, shown(1))


def show_twice_over_the_resume(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown.insert(0, shown(3))


def swap_two(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown.reverse()


def show_another_channels(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown.append(shown(5, channel_id=2))


def show_another_channels_as_ours(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown[1] = Shown(1.0, 1, 5, "m2-5", "k2-5")


def show_what_is_not_stored(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[1].shown.append(shown(6))


LIES: list[tuple[Callable[[Ledger, Stores], None], str]] = [
    (lose_a_row, "lost"),
    (leave_a_hole, "lost"),
    (acknowledge_another, "lost"),
    (skip_one, "lost"),
    (skip_one_at_the_resume, "lost"),
    (miss_the_last, "lost"),
    (forget_the_cursor, "lost"),
    (begin_in_the_middle, "lost"),
    (begin_after_the_cursor, "lost"),
    (store_twice, "doubled"),
    (acknowledge_twice, "doubled"),
    (show_twice, "doubled"),
    (show_twice_over_the_resume, "doubled"),
    (swap_two, "reordered"),
    (show_another_channels, "leaked"),
    (show_another_channels_as_ours, "leaked"),
    (store_what_was_refused, "refused"),
    (refuse_what_is_allowed, "wronged"),
    (store_what_nobody_sent, "forged"),
    (show_what_is_not_stored, "forged"),
]


@pytest.mark.parametrize(("lie", "kind"), LIES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_lie_is_caught(lie: Callable[[Ledger, Stores], None], kind: str):
    ledger, stored = truth()
    lie(ledger, stored)
    assert kind in {violation.kind for violation in check(ledger, stored)}


def test_a_page_without_a_cursor_may_begin_later_once_it_is_full():
    """The newest 50 of 60; but not 50 of which one was sent only afterwards."""
    ledger = Ledger([send(seq) for seq in range(1, 61)])
    stored = {1: [Stored(seq, f"m1-{seq}", f"k1-{seq}") for seq in range(1, 61)]}
    page = [shown(seq) for seq in range(60 - PAGE + 1, 61)]
    ledger.readers = [Reader(1, "fresh", [Session(0, None, 0.0, shown=page)])]
    assert check(ledger, stored) == []
    ledger.sends[-1].attempts[0].at = 1.5
    assert [violation.kind for violation in check(ledger, stored)] == ["lost"]


# Acknowledged at 1.01 s. What is there until then and is not shown it is judged by its own clock.

AT = 1.01
LATE = AT + SEEN_SECONDS + 0.1


def quiet(*sessions: Session, ended: float = 60.0) -> tuple[Ledger, Stores]:
    """One message, and a reader who was there or came."""
    ledger = Ledger([send(1)], [Reader(1, "prospect", list(sessions))], ended=ended)
    return ledger, {1: [Stored(1, "m1-1", "k1-1")]}


def seen(at: float) -> Shown:
    return Shown(at, 1, 1, "m1-1", "k1-1")


@pytest.mark.parametrize(
    "sessions",
    [
        [Session(0, None, 0.0, 0.1, shown=[seen(AT - 0.005)])],
        [Session(0, None, 0.0, 0.1, shown=[seen(LATE - 0.2)])],
        [Session(0, None, 0.0, 0.1, LATE - 0.2), Session(0, None, 9.0, 9.1, shown=[seen(9.2)])],
        [Session(0, None, 0.0, 0.0, LATE)],  # never told that it was connected
    ],
    ids=["at once", "just in time", "cut before, and shown then", "never there"],
)
def test_in_time_or_not_there(sessions: list[Session]):
    assert check(*quiet(*sessions)) == []


@pytest.mark.parametrize(
    "sessions",
    [
        [Session(0, None, 0.0, 0.1, shown=[seen(LATE)])],
        [Session(0, None, 0.0, 0.1)],
        [Session(0, None, 0.0, 0.1, LATE), Session(0, None, 9.0, 9.1, shown=[seen(9.2)])],
        [Session(0, None, 20.0, 20.1, shown=[seen(20.2 + SEEN_SECONDS)])],
    ],
    ids=["late", "never", "only after it came back", "who came later"],
)
def test_a_stream_that_is_there_is_shown_it_in_time(sessions: list[Session]):
    assert [violation.kind for violation in check(*quiet(*sessions))] == ["late"]


def test_the_clock_stands_still_while_something_is_broken():
    ledger, stored = quiet(Session(0, None, 0.0, 0.1, shown=[seen(LATE + 4.0)]))
    ledger.troubles = [(3.0, 5.0), (2.0, 4.0), (6.0, 6.5), (6.1, 6.2), (100.0, 200.0)]
    (wait,) = waits(ledger, stored)
    assert wait.seconds == pytest.approx(SEEN_SECONDS + 0.6)
    ledger.troubles.append((0.0, 2.0))
    assert check(ledger, stored) == []


def test_what_was_never_acknowledged_has_no_time():
    ledger, stored = quiet(Session(0, None, 0.0, 0.1))
    ledger.sends[0].attempts = [Attempt(1.0, 8.0, UNKNOWN, 0)]
    assert check(ledger, stored) == []


# The database is put back to an earlier point: of five messages three were in the backup, and two
# others took the numbers of those that were not.

EPOCH = 1795430000
BACKUP = 1.015
RESTORED = 10.0


def other(seq: int) -> Shown:
    return Shown(12.5, 1, seq, f"n1-{seq}", f"o1-{seq}", EPOCH)


def again(seq: int) -> Shown:
    return Shown(12.5, 1, seq, f"m1-{seq}", f"k1-{seq}", EPOCH)


def restored() -> tuple[Ledger, Stores]:
    before = [Stored(seq, f"m1-{seq}", f"k1-{seq}") for seq in range(1, 6)]
    after = [*before[:3], *(Stored(seq, f"n1-{seq}", f"o1-{seq}") for seq in (4, 5))]
    sends = [send(seq) for seq in range(1, 6)]
    for lost in sends[3:]:
        lost.attempts[0].at = 1.02
    for seq in (4, 5):
        attempt = Attempt(12.0, 0.01, 200, 0, seq, f"n1-{seq}")
        sends.append(Send(1, "therapist", f"o1-{seq}", [attempt]))
    reader = Reader(
        1,
        "prospect",
        [
            Session(0, None, 0.0, 0.1, 9.0, [shown(seq) for seq in range(1, 6)]),
            Session(1, 5, 10.5, 0.0, 10.6),  # died before it could be told
            Session(
                1, 5, 11.0, 11.1, shown=[*map(again, (1, 2, 3)), *map(other, (4, 5))], resets=[0]
            ),
        ],
        caught_up=True,
    )
    ledger = Ledger(sends, [reader], ended=60.0, epoch=EPOCH)
    ledger.past = [Era(0, BACKUP, RESTORED, {1: before})]
    return ledger, {1: after}


def test_what_was_not_in_the_backup_is_no_violation():
    ledger, stored = restored()
    assert check(ledger, stored) == []
    assert taken_back(ledger) == 2
    assert sum(wait.shown for wait in waits(ledger, stored)) == 5 + 2


def lose_what_was_in_the_backup(ledger: Ledger, stored: Stores) -> None:
    stored[1][2] = Stored(3, "n1-3", "k1-3")


def believe_a_cursor_of_the_lost_future(ledger: Ledger, stored: Stores) -> None:
    last = ledger.readers[0].sessions[-1]
    last.resets, last.shown = [], []


def tell_it_too_late(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[-1].resets = [1]


def show_the_lost_future(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[-1].shown[4] = Shown(12.5, 1, 5, "m1-5", "k1-5", EPOCH)


def show_the_lost_future_under_its_own_name(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[-1].shown[0].epoch = 0


def show_the_next_era_before_it(ledger: Ledger, stored: Stores) -> None:
    ledger.readers[0].sessions[0].shown[4] = Shown(9.0, 1, 5, "n1-5", "o1-5")


def lose_what_is_acknowledged_afterwards(ledger: Ledger, stored: Stores) -> None:
    stored[1].pop()
    ledger.readers[0].sessions[-1].shown.pop()


def lose_what_was_acknowledged_before(ledger: Ledger, stored: Stores) -> None:
    ledger.past[0].stored = {1: ledger.past[0].stored[1][:4]}


@pytest.mark.parametrize(
    ("lie", "kind"),
    [
        (lose_what_was_in_the_backup, "lost"),
        (believe_a_cursor_of_the_lost_future, "lost"),
        (tell_it_too_late, "lost"),
        (show_the_lost_future, "leaked"),
        (show_the_lost_future_under_its_own_name, "leaked"),
        (show_the_next_era_before_it, "leaked"),
        (lose_what_is_acknowledged_afterwards, "lost"),
        (lose_what_was_acknowledged_before, "lost"),
    ],
)
def test_a_lie_about_a_restored_database_is_caught(
    lie: Callable[[Ledger, Stores], None], kind: str
):
    ledger, stored = restored()
    lie(ledger, stored)
    assert kind in {violation.kind for violation in check(ledger, stored)}
