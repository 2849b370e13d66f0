"""Times leave as ISO 8601 in UTC, with milliseconds."""

import pytest

from protocol.replies import timestamp


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_382_129_007, "2026-11-22T21:15:29.007Z"),
        (1_795_382_129_999, "2026-11-22T21:15:29.999Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
    ],
)
def test_a_time_is_told_to_the_millisecond(ms: int, text: str):
    assert timestamp(ms) == text
