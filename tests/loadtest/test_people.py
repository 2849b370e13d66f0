"""Seats: both of a channel are in one process, and nobody sits twice."""

import json

import pytest

from loadtest.people import NoSeat, Seats, read_pairs


@pytest.fixture
def file(tmp_path):
    lines = [
        {"channel_id": n, "therapist_token": f"t{n}", "prospect_token": f"p{n}"} for n in range(5)
    ]
    (tmp_path / "tokens").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path / "tokens"


def test_processes_share_the_channels_out(file):
    shares = [[pair.channel_id for pair in read_pairs(file, index=i, of=2)] for i in range(2)]
    assert shares == [[0, 2, 4], [1, 3]]


def test_both_of_a_channel_sit_before_the_next(file):
    seats = Seats(read_pairs(file))
    taken = [seats.take() for _ in range(10)]
    assert [(seat.channel_id, seat.token) for seat in taken[:3]] == [
        (0, "t0"),
        (0, "p0"),
        (1, "t1"),
    ]
    assert len({seat.token for seat in taken}) == 10
    with pytest.raises(NoSeat):
        seats.take()
    seats.give_back(taken[3])
    assert seats.take() == taken[3]


def test_a_token_is_in_no_repr(file):
    pair = read_pairs(file)[0]
    assert "t0" not in repr(pair) + repr(Seats([pair]).take())


def test_one_knows_ones_own_messages(file):
    seats = Seats(read_pairs(file))
    one, other = seats.take(), seats.take()
    message_id = one.new_message_id()
    assert len(message_id) == 36
    assert message_id != one.new_message_id()
    assert one.wrote(message_id)
    assert not other.wrote(message_id)
    assert not one.wrote("")
