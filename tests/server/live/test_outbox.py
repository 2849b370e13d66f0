"""An outbox is bounded in bytes, as they stand on the wire, and keeps the order."""

from protocol.frames import join_frames
from server.live.outbox import Outbox
from tests.server.live.fakes import frame, frames


def test_what_was_offered_is_taken_in_order_and_once():
    outbox = Outbox(limit=1000)
    first, second = frames(1, 2)
    assert outbox.take() == []
    assert outbox.offer(first) and outbox.offer(second)
    assert len(outbox) == len(first.chunked) + len(second.chunked)
    taken = outbox.take()
    assert taken[0] is first, "not copied"
    assert taken == [first, second]
    assert len(outbox) == 0
    assert outbox.take() == []


def test_it_holds_up_to_its_limit_in_bytes():
    one = frame(1)
    outbox = Outbox(limit=3 * len(one.chunked))
    assert [outbox.offer(one) for _ in range(5)] == [True, True, True, False, False]
    assert len(outbox) == 3 * len(one.chunked), "what is refused is not taken"
    assert outbox.take() == [one] * 3
    assert outbox.offer(one), "there is room again"
    assert not outbox.offer(join_frames(frames(1, 2, 3))), "a batch counts with all of its bytes"
