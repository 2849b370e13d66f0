"""How people write: lengths and pauses, from stated distributions. They are assumptions.

Nobody's conversations were counted for them. They give short and long messages, quick answers and
long silences in a proportion that a chat may have; a plan for a real deployment should replace
them by its own numbers.
"""

import random
import re

LENGTH_MEDIAN, LENGTH_SIGMA = 45, 0.9
"""Characters of a message, log-normal: one in ten is over 140, one in a hundred over 360."""
LENGTH_MOST = 2_000
TYPING_PER_SECOND = 4.0
"""Characters: 48 words a minute."""
THINK_MEDIAN, THINK_SIGMA, THINK_MOST = 12.0, 1.0, 180.0
"""Seconds before somebody begins to type, log-normal: one in ten takes over 43."""
STAY_MEAN = 300.0
"""Seconds that somebody looks at the chat before they leave, exponential."""
AWAY_MEAN = 90.0
"""Seconds until they come back, exponential."""
SAME_PAGE = 0.5
"""Share of those who come back that never closed the page: they resume by their cursor."""

WORDS = (
    "and", "the", "then", "today", "morning", "walk", "again", "better", "think", "about",
    "because", "maybe", "sleep", "write", "down", "next", "week", "would", "like", "some",
)  # fmt: skip
_STAMP = re.compile(r"~(\d+)!")


def stamp(seconds: float) -> str:
    """What carries a moment of `time.monotonic` in a text, to the microsecond."""
    return f"~{round(seconds * 1e6)}!"


def stamped_at(text: str) -> float | None:
    """The moment in a text; None if it has none."""
    found = _STAMP.search(text)
    return None if found is None else int(found[1]) / 1e6


def message(rng: random.Random, sent_at: float) -> str:
    """A text of a usual length that carries its moment."""
    mark = stamp(sent_at)
    length = min(LENGTH_MOST, round(rng.lognormvariate(0.0, LENGTH_SIGMA) * LENGTH_MEDIAN))
    words = " ".join(rng.choices(WORDS, k=max(1, length // 6)))
    return f"{mark} {words}"[: max(len(mark), length)]


def typing_seconds(text: str) -> float:
    return len(text) / TYPING_PER_SECOND


def thinking_seconds(rng: random.Random) -> float:
    return min(THINK_MOST, rng.lognormvariate(0.0, THINK_SIGMA) * THINK_MEDIAN)
