"""A cursor is read back as it was written; another server's id is told from what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.cursors import (
    FOREIGN,
    MAX_FOREIGN_BYTES,
    MAX_SEQ,
    Cursor,
    CursorError,
    encode_cursor,
    parse_cursor,
)


@given(epoch=st.integers(0, 10**10 - 1), seq=st.integers(0, MAX_SEQ))
def test_a_cursor_comes_back_as_it_was_sent(epoch: int, seq: int):
    raw = encode_cursor(epoch, seq)
    assert parse_cursor(raw) == Cursor(epoch, seq)
    assert Cursor(epoch, seq).encode() == raw


def test_the_first_epoch_is_plain_decimal():
    assert encode_cursor(0, 17) == b"17"
    assert encode_cursor(2, 17) == b"2.17"


@pytest.mark.parametrize("raw", [b"", b" ", b"\t \r\n"])
def test_no_cursor_is_none(raw: bytes):
    assert parse_cursor(raw) is None


@pytest.mark.parametrize("raw", [b" 17", b"17 ", b"\t17\t"])
def test_space_around_a_header_value_does_not_count(raw: bytes):
    assert parse_cursor(raw) == Cursor(0, 17)


@pytest.mark.parametrize(
    "raw",
    [
        b"+1", b"-1", b"1 7", b"1_000", b"1,000", b"0x10", b"1e3", b"abc", b"1a", b"null", b"1, 2",
        b".", b"1.", b".1", b"1.2.3", b"1..2", b"-1.2", b"1.-2", b"1. 2",
        "１７".encode(), "٣".encode(), "²".encode(), "é\u00a0\u3000💬".encode(),
        b"1" * 20, b"0" * 20, b"%d" % (MAX_SEQ + 1), b"9" * 19, b"1.%d" % (MAX_SEQ + 1),
        b"1" * 11 + b".1", b"1" * MAX_FOREIGN_BYTES,
        b"0d8e3ad1-6a3f-4a53-9e2b-5d3a8f1c2b7e", b"urn:uuid:0d8e3ad1", b"1526919030474-55",
    ],
)  # fmt: skip
def test_another_servers_id_is_of_no_past_of_ours(raw: bytes):
    assert parse_cursor(raw) is FOREIGN


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff", b"17\x00", b"1\n7", b"1\t7", b"\x7f1", "\x85".encode() + b"1",
        b"1" * (MAX_FOREIGN_BYTES + 1), b"1" * 100_000, "é".encode() * MAX_FOREIGN_BYTES,
    ],
)  # fmt: skip
def test_what_no_server_gives_is_refused_and_not_repeated(raw: bytes):
    with pytest.raises(CursorError) as caught:
        parse_cursor(raw)
    assert str(caught.value) == ""


def test_the_highest_number_is_a_cursor():
    assert parse_cursor(b"9223372036854775807") == Cursor(0, 2**63 - 1)


@given(st.binary(max_size=30))
def test_any_bytes_are_a_cursor_none_or_refused(raw: bytes):
    try:
        cursor = parse_cursor(raw)
    except CursorError:
        return
    assert cursor in (None, FOREIGN) or 0 <= cursor.seq <= MAX_SEQ
