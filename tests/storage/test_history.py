"""A page from Redis is exactly what the reader is owed, or there is none."""

from hypothesis import given
from hypothesis import strategies as st

from storage.contract import Record
from storage.history import prove


def records(*seqs: int) -> list[Record]:
    return [Record(seq, seq * 10, b"{}", b"{}") for seq in seqs]


@given(data=st.data(), newest=st.integers(0, 40), size=st.integers(1, 12))
def test_a_page_is_what_the_reader_is_owed_or_none(data: st.DataObject, newest: int, size: int):
    """Redis has any part of the true history 1..newest: holes, no tail, no beginning."""
    has = sorted(data.draw(st.sets(st.integers(1, newest)) if newest else st.just(set())))
    if data.draw(st.booleans()) and has:  # often enough a whole run
        has = list(range(has[0], has[-1] + 1))
    head = data.draw(st.integers(0, newest), label="head that the reader knows")
    after = data.draw(st.none() | st.integers(0, newest + 3), label="after")
    page = prove(records(*has), after=after, head=head, size=size)

    runs_on = bool(has) and has == list(range(has[0], has[-1] + 1))
    proved_up_to = has[-1] if runs_on and has[-1] >= head else None
    if proved_up_to is None or (after is not None and after > proved_up_to):
        assert page is None
        return
    first_owed = max(1, proved_up_to - size + 1) if after is None else after + 1
    owed = list(range(first_owed, proved_up_to + 1))
    if not set(owed) <= set(has):
        assert page is None
        return
    assert page is not None, "what proves to be complete is used"
    assert [record.seq for record in page.records] == owed
    assert page.head == proved_up_to
    assert page.reset is False


def test_nothing_proves_nothing():
    assert prove([], after=None, head=0, size=50) is None
    assert prove([], after=0, head=0, size=50) is None


def test_a_hole_is_no_proof():
    assert prove(records(1, 2, 4), after=None, head=0, size=50) is None
    assert prove(records(1, 2, 4), after=3, head=0, size=50) is None


def test_less_than_the_known_head_is_no_proof():
    assert prove(records(1, 2, 3), after=1, head=4, size=50) is None
    page = prove(records(1, 2, 3), after=1, head=3, size=50)
    assert page is not None
    assert page.head == 3


def test_a_reader_who_has_everything_is_owed_nothing():
    page = prove(records(4, 5), after=5, head=5, size=50)
    assert page is not None
    assert (page.records, page.head) == ([], 5)


def test_a_cursor_ahead_is_for_postgresql_to_judge():
    assert prove(records(4, 5), after=6, head=5, size=50) is None


def test_a_cursor_just_before_the_oldest_is_enough():
    page = prove(records(4, 5), after=3, head=5, size=50)
    assert page is not None
    assert len(page.records) == 2
    assert prove(records(4, 5), after=2, head=5, size=50) is None


def test_the_newest_are_enough_if_there_are_so_many_or_no_more():
    assert prove(records(2, 3), after=None, head=3, size=3) is None
    for has, size in (((1, 2), 50), ((2, 3, 4), 3), ((2, 3, 4), 2)):
        page = prove(records(*has), after=None, head=0, size=size)
        assert page is not None
        assert [record.seq for record in page.records] == list(has)[-size:]
