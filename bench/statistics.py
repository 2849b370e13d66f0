"""Medians, spreads, percentiles, and the order in which rounds are run."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Summary(NamedTuple):
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def median(values: Iterable[float]) -> float:
    """Of at least one value; of an even number the mean of the two in the middle."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def summarize(values: Iterable[float]) -> Summary:
    """Median, least and most. The spread is the whole of it: a few rounds have no quartiles."""
    values = list(values)
    return Summary(median(values), min(values), max(values), len(values))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least of the sorted values that `share` of them (0 to 1] do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def interleave(subjects: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """A B C A B C: what drifts on the machine meets all of them alike."""
    for number in range(rounds):
        for subject in subjects:
            yield number, subject
