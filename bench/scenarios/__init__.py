"""One file per scenario; each yields samples. `Plan` says how much of it is run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.results import Sample


class Plan(NamedTuple):
    """How long, how often, how many.

    Args:
        subjects: names, of those that are here.
        rounds: of everything that is repeated.
        seconds: of one measurement.
        quick: fewer cases.
        say: what is being done, for who waits.
        guard: runs a measurement and notes a failure instead of raising it.
    """

    subjects: list[str]
    rounds: int
    seconds: float
    quick: bool
    say: Callable[[str], None]
    guard: Callable[[str, Iterator[Sample]], Iterator[Sample]]

    def of(self, *names: str) -> list[str]:
        """Those of the named that are to be measured."""
        return [name for name in names if name in self.subjects]
