"""Forged events: what should not have been is noticed, and nothing else is."""

from loadtest.ledger import PAGE, Ledger, Reader, Shown, Tally

NOW = 100.0
SETTLED = NOW + 5.0


def joined(ledger: Ledger, *, at: float = NOW, excused: bool = False) -> Reader:
    reader = ledger.join(7, excused=excused)
    ledger.connected(reader, at, resumed=False)
    return reader


def send(ledger: Ledger, seq: int, *, at: float = NOW) -> None:
    ledger.sending(7)
    ledger.acknowledged(7, seq, sent_at=at, now=at)


def wrong(tally: Tally) -> tuple[int, int, int, int]:
    return tally.duplicates, tally.gaps, tally.reorderings, tally.lost


def test_what_comes_in_order_is_delivered():
    ledger = Ledger()
    readers = [joined(ledger), joined(ledger)]
    for seq in (1, 2, 3):
        send(ledger, seq)
        for reader in readers:
            assert ledger.shown(reader, seq) is Shown.NEXT
    assert ledger.settle(SETTLED - 0.1) == 0
    assert ledger.tally.expected == 0
    assert ledger.settle(SETTLED) == 0
    assert (ledger.tally.expected, ledger.tally.delivered) == (6, 6)
    assert wrong(ledger.tally) == (0, 0, 0, 0)
    assert ledger.tally.delivery_percent == 100


def test_a_message_that_comes_twice_is_a_duplicate():
    ledger = Ledger()
    reader = joined(ledger)
    ledger.shown(reader, 1)
    ledger.shown(reader, 2)
    assert ledger.shown(reader, 2) is Shown.DUPLICATE
    assert ledger.shown(reader, 1) is Shown.DUPLICATE
    assert wrong(ledger.tally) == (2, 0, 0, 0)


def test_a_message_that_is_left_out_is_a_gap_and_lost():
    ledger = Ledger()
    reader = joined(ledger)
    for seq in (1, 2, 3):
        send(ledger, seq)
    ledger.shown(reader, 1)
    assert ledger.shown(reader, 3) is Shown.GAP
    assert ledger.settle(SETTLED) == 1
    assert wrong(ledger.tally) == (0, 1, 0, 1)
    assert (ledger.tally.expected, ledger.tally.delivered) == (3, 2)


def test_the_last_message_of_all_is_missed_too():
    ledger = Ledger()
    reader = joined(ledger)
    send(ledger, 1)
    ledger.shown(reader, 1)
    send(ledger, 2)
    assert ledger.settle(SETTLED) == 1
    assert wrong(ledger.tally) == (0, 0, 0, 1)


def test_a_message_that_comes_after_a_later_one_is_reordered():
    ledger = Ledger()
    reader = joined(ledger)
    ledger.shown(reader, 1)
    ledger.shown(reader, 3)
    assert ledger.shown(reader, 2) is Shown.REORDERED
    assert ledger.shown(reader, 2) is Shown.DUPLICATE
    assert wrong(ledger.tally) == (1, 1, 1, 0)


def test_a_reader_who_was_away_is_owed_what_was_sent_meanwhile():
    ledger = Ledger()
    reader = joined(ledger)
    ledger.shown(reader, 1)
    ledger.away(reader)
    send(ledger, 2)
    assert ledger.settle(SETTLED) == 0
    assert ledger.tally.expected == 0
    ledger.connected(reader, SETTLED, resumed=True)
    assert ledger.shown(reader, 2) is Shown.NEXT
    ledger.settle(SETTLED + 6)
    assert (ledger.tally.expected, ledger.tally.delivered) == (1, 1)


def test_a_reader_who_came_back_and_is_not_shown_it_has_lost_it():
    ledger = Ledger()
    reader = joined(ledger)
    ledger.shown(reader, 1)
    ledger.away(reader)
    send(ledger, 2)
    ledger.settle(SETTLED)
    ledger.connected(reader, SETTLED, resumed=True)
    assert ledger.settle(SETTLED + 6) == 1
    assert wrong(ledger.tally) == (0, 0, 0, 1)


def test_nothing_is_owed_from_before_one_came_or_after_one_left():
    ledger = Ledger()
    send(ledger, 1)
    reader = joined(ledger, at=NOW + 1)
    leaver = joined(ledger, at=NOW + 1)
    send(ledger, 2, at=NOW + 2)
    ledger.leave(leaver)
    ledger.shown(reader, 1)
    ledger.shown(reader, 2)
    assert ledger.settle(SETTLED + 2) == 0
    assert ledger.tally.expected == 1


def test_the_time_of_a_slow_reader_is_not_judged_but_its_order_is():
    ledger = Ledger()
    reader = joined(ledger, excused=True)
    ledger.shown(reader, 1)
    send(ledger, 2)
    send(ledger, 3)
    assert ledger.settle(SETTLED + 100) == 0
    assert ledger.shown(reader, 3) is Shown.GAP


def test_a_first_page_begins_at_the_first_message_or_is_full():
    ledger = Ledger()
    for seq in range(1, 61):
        send(ledger, seq)
    full, short = joined(ledger), joined(ledger)
    assert ledger.shown(full, 60 - PAGE + 1) is Shown.NEXT
    assert ledger.shown(short, 60 - PAGE + 2) is Shown.GAP
    assert ledger.tally.gaps == 1


def test_a_send_on_its_way_may_have_moved_the_page():
    ledger = Ledger()
    for seq in range(1, 61):
        send(ledger, seq)
    ledger.sending(7)
    assert ledger.shown(joined(ledger), 60 - PAGE + 2) is Shown.NEXT
    ledger.refused(7)
    assert ledger.shown(joined(ledger), 60 - PAGE + 2) is Shown.GAP


def test_tallies_of_processes_add_up():
    one, other = Tally(expected=3, delivered=2), Tally(expected=1, delivered=1, gaps=4)
    total = one.plus(other)
    assert (total.expected, total.delivered, total.gaps) == (4, 3, 4)
    assert total.delivery_percent == 75
    assert total.minus(other) == one
