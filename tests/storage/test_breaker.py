"""The breaker's whole table, and what callers see of it."""

import pytest

from storage.breaker import Breaker, Event, State
from storage.contract import StoreUnavailable

TABLE = [
    # state, event, state after it with a tolerance of one
    (State.CLOSED, Event.SUCCEEDED, State.CLOSED),
    (State.CLOSED, Event.FAILED, State.OPEN),
    (State.CLOSED, Event.REFUSED, State.OPEN),
    (State.CLOSED, Event.DENIED, State.OPEN),
    (State.CLOSED, Event.PROBING, State.CLOSED),
    (State.OPEN, Event.SUCCEEDED, State.OPEN),
    (State.OPEN, Event.FAILED, State.OPEN),
    (State.OPEN, Event.REFUSED, State.OPEN),
    (State.OPEN, Event.DENIED, State.OPEN),
    (State.OPEN, Event.PROBING, State.HALF_OPEN),
    (State.HALF_OPEN, Event.SUCCEEDED, State.CLOSED),
    (State.HALF_OPEN, Event.FAILED, State.OPEN),
    (State.HALF_OPEN, Event.REFUSED, State.OPEN),
    (State.HALF_OPEN, Event.DENIED, State.OPEN),
    (State.HALF_OPEN, Event.PROBING, State.HALF_OPEN),
]
WAY = {
    State.CLOSED: [],
    State.OPEN: [Event.REFUSED],
    State.HALF_OPEN: [Event.REFUSED, Event.PROBING],
}


def breaker_in(state: State, tolerance: int = 1) -> tuple[Breaker, list[bool]]:
    changes: list[bool] = []
    breaker = Breaker("x", tolerance=tolerance, on_change=lambda b: changes.append(b.up))
    for event in WAY[state]:
        breaker.record(event)
    assert breaker.state is state
    changes.clear()
    return breaker, changes


def test_the_table_below_is_whole():
    assert {(state, event) for state, event, _ in TABLE} == {(s, e) for s in State for e in Event}


@pytest.mark.parametrize(("state", "event", "after"), TABLE)
def test_an_event_moves_it_as_the_table_says(state: State, event: Event, after: State):
    breaker, changes = breaker_in(state)
    breaker.record(event)
    assert breaker.state is after
    was_up, is_up = state is State.CLOSED, after is State.CLOSED
    assert breaker.up is is_up
    assert breaker.opened.is_set() is not is_up
    assert changes == ([is_up] if was_up != is_up else [])


@pytest.mark.parametrize("state", State)
def test_calls_go_through_while_it_is_closed_and_only_then(state: State):
    breaker, _ = breaker_in(state)
    if state is State.CLOSED:
        breaker.check()
    else:
        with pytest.raises(StoreUnavailable):
            breaker.check()


def test_it_bears_fewer_failures_in_a_row_than_its_tolerance():
    breaker, changes = breaker_in(State.CLOSED, tolerance=3)
    for _ in range(5):
        breaker.record(Event.FAILED)
        breaker.record(Event.FAILED)
        breaker.record(Event.SUCCEEDED)
    assert breaker.up
    for _ in range(3):
        breaker.record(Event.FAILED)
    assert breaker.state is State.OPEN
    assert changes == [False]


@pytest.mark.parametrize("event", [Event.REFUSED, Event.DENIED])
def test_one_refused_connection_or_command_is_enough(event: Event):
    breaker, _ = breaker_in(State.CLOSED, tolerance=3)
    breaker.record(event)
    assert breaker.state is State.OPEN
    assert breaker.denied is (event is Event.DENIED)


def test_while_it_is_held_a_probe_that_succeeds_does_not_close_it():
    breaker, changes = breaker_in(State.HALF_OPEN)
    breaker.held = True
    breaker.record(Event.SUCCEEDED)
    assert (breaker.state, breaker.denied, changes) == (State.OPEN, True, [])
    breaker.held = False
    breaker.record(Event.PROBING)
    breaker.record(Event.SUCCEEDED)
    assert (breaker.up, breaker.denied) == (True, False)


def test_one_failure_of_the_probe_is_enough():
    breaker, _ = breaker_in(State.HALF_OPEN, tolerance=3)
    breaker.record(Event.FAILED)
    assert breaker.state is State.OPEN


def test_after_recovery_it_bears_failures_again():
    breaker, _ = breaker_in(State.CLOSED, tolerance=2)
    for event in (Event.FAILED, Event.FAILED, Event.PROBING, Event.SUCCEEDED, Event.FAILED):
        breaker.record(event)
    assert breaker.up


async def test_whoever_waits_for_it_to_open_is_woken_each_time():
    breaker, _ = breaker_in(State.CLOSED)
    for _ in range(2):
        opened = breaker.opened
        assert not opened.is_set()
        breaker.record(Event.REFUSED)
        assert opened.is_set()
        breaker.record(Event.PROBING)
        assert breaker.opened is opened
        breaker.record(Event.SUCCEEDED)


def test_since_is_when_it_last_went_between_up_and_down(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("storage.breaker.time.time", lambda: now)
    breaker = Breaker("x", tolerance=2, on_change=lambda _: None)
    assert breaker.since == 1000.0
    for moment, event, since in [
        (1001.0, Event.FAILED, 1000.0),  # not yet
        (1002.0, Event.FAILED, 1002.0),
        (1003.0, Event.PROBING, 1002.0),  # half open is still down
        (1004.0, Event.FAILED, 1002.0),
        (1005.0, Event.PROBING, 1002.0),
        (1006.0, Event.SUCCEEDED, 1006.0),
        (1007.0, Event.SUCCEEDED, 1006.0),
    ]:
        now = moment
        breaker.record(event)
        assert breaker.since == since


def test_it_is_suspect_from_the_first_failure_until_a_success():
    told: list[bool] = []
    breaker = Breaker("x", tolerance=2, on_change=lambda _: None)
    breaker.on_suspect = lambda: told.append(breaker.suspect)
    assert not breaker.suspect
    breaker.record(Event.FAILED)
    assert (breaker.up, breaker.suspect, told) == (True, True, [True])
    breaker.record(Event.SUCCEEDED)
    assert not breaker.suspect
    breaker.record(Event.REFUSED)
    assert (breaker.up, breaker.suspect, told) == (False, True, [True])
    breaker.record(Event.PROBING)
    assert breaker.suspect
    breaker.record(Event.SUCCEEDED)
    assert not breaker.suspect
