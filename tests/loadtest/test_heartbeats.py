"""A silent stream is noticed once; our own absence is nobody's silence."""

from dataclasses import dataclass

from loadtest.heartbeats import Listening


@dataclass
class Stream:
    heard_at: float | None


def test_a_stream_that_is_silent_for_two_heartbeats_is_noticed():
    quiet, heard, closed = Stream(0.0), Stream(25.0), Stream(None)
    listening = Listening(15.0)
    assert listening.silent([quiet], 29.0) == []
    assert listening.silent([quiet, heard, closed], 30.0) == []
    assert listening.silent([quiet, heard, closed], 31.0) == [quiet]


def test_a_look_that_comes_late_says_nothing():
    quiet = Stream(0.0)
    listening = Listening(15.0)
    assert listening.silent([quiet], 30.0) == []
    assert listening.silent([quiet], 40.0) == []  # we did not listen for ten seconds
    assert listening.silent([quiet], 41.0) == [quiet]
