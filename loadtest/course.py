"""The course of a run: what was seen in each second, and what was done. Pure."""

from typing import NamedTuple


class Row(NamedTuple):
    """A second of the run.

    Attributes:
        at: seconds since its beginning.
        rate: percent of what was owed and came due in this second that had been shown; None if
            nothing was.
        p50, p99: milliseconds, of the deliveries of the last ten seconds; None without any.
        cpu: percent of a core, of the busiest generator process.
        lag: milliseconds by which its loop was late, on average.
    """

    at: float
    users: int
    open: int
    sends: float
    deliveries: float
    rate: float | None
    p50: float | None
    p99: float | None
    cpu: float
    lag: float


class Mark(NamedTuple):
    """Something that was done to the server or to everybody."""

    at: float
    what: str
