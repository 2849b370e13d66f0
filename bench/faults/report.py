"""What a campaign showed, in tables; and whether it was fast enough."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.faults.campaign import Outcome, Times, Usage
from bench.faults.faults import FAULTS
from bench.faults.ledger import SEEN_SECONDS, taken_back
from bench.statistics import median, percentile


class Limit(NamedTuple):
    """A time that a fault must not go beyond.

    Attributes:
        kinds: beginnings of the faults' names.
        most: seconds.
    """

    what: str
    kinds: tuple[str, ...]
    value: Callable[[Times], float | None]
    most: float


VALKEY = ("valkey",)
SLOW = ("valkey slow",)
"""About as slow as a call's time limit: one server's calls may fail while those of the other do
not, and what that one has not published the other finds when it looks."""
GONE = tuple(kind for kind in FAULTS if kind.startswith(VALKEY) and not kind.startswith(SLOW))
ONE_WAY = ("one server",)
"""To Valkey: the other servers have theirs, and are told nothing of what this one takes."""
LOCKED = ("a channel's row locked",)
"""One channel of so many that it is no part of a p99."""
POSTGRES = ("postgres", "the way to postgres")
RESTORED = ("postgres is restored",)
"""The servers are stopped for it and started again, and everybody comes to them at once while they
know nothing: an answer may take longer than one that only waits for PostgreSQL."""
DIED = tuple(kind for kind in FAULTS if kind.startswith(POSTGRES) and not kind.startswith(RESTORED))

BYTES = "a byte at a time"
"""There the campaign's own proxy is what is slow: its times say nothing of the servers."""

LIMITS = [
    Limit("valkey's: live delivery on this server, p99", VALKEY + ONE_WAY, lambda t: t.same, 0.25),
    Limit("valkey's: delivery over the other server, p99", GONE, lambda t: t.other, 1.0),
    Limit("postgres': the slowest answer to a send", DIED, lambda t: t.answer, 2.0),
    Limit("postgres restored: the slowest answer to a send", RESTORED, lambda t: t.answer, 3.0),
    Limit("postgres back: sends succeed after", POSTGRES, lambda t: t.sends_back, 3.0),
    Limit("valkey back: used again after", VALKEY + ONE_WAY, lambda t: t.ready_back, 5.0),
    Limit("a channel locked: delivery of all others, p99", LOCKED, lambda t: t.same, 0.25),
    Limit("a channel locked: the slowest answer to a send", LOCKED, lambda t: t.answer, 2.0),
    Limit("worker killed: its clients are live after", ("worker",), lambda t: t.streams_back, 3.0),
    Limit(
        "committed and never published: delivered within",
        ("worker killed after a commit", *ONE_WAY, *SLOW),
        lambda t: t.other,
        5.0,
    ),
]


class Row(NamedTuple):
    """A limit, and what was reached.

    Attributes:
        at: which fault was the worst one, and when it came.
    """

    limit: Limit
    middle: float
    worst: float
    at: str

    @property
    def held(self) -> bool:
        return self.worst <= self.limit.most


def rows(outcome: Outcome) -> list[Row]:
    """Those of which something was measured."""
    found = []
    for limit in LIMITS:
        values = [
            (value, _which(kind, each))
            for kind, times in outcome.times.items()
            if kind.startswith(limit.kinds) and not kind.endswith(BYTES)
            for each in times
            if (value := limit.value(each)) is not None
        ]
        if values:
            found.append(Row(limit, median(value for value, _ in values), *max(values)))
    return found


def _which(kind: str, times: Times) -> str:
    late = f"; the campaign {times.late:.2f} s late" if times.late else ""
    return f"{kind}, {times.began:.0f} s{late}"


def show(outcome: Outcome, console: Console) -> None:
    ledger = outcome.ledger
    faults = Table(
        title=f"{outcome.faults.total()} faults, seed {outcome.seed}", title_justify="left"
    )
    for name in (
        "fault",
        "times",
        "same p99",
        "other p99",
        "answer",
        "sends",
        "streams",
        "ready",
        "late",
    ):
        faults.add_column(name, justify="left" if name == "fault" else "right")
    for kind, count in sorted(outcome.faults.items()):
        times = outcome.times[kind]
        faults.add_row(kind, str(count), *(_worst(times, index) for index in range(1, 8)))
    console.print(faults)
    limits = Table(
        title="seconds: median and worst of the faults that came alone", title_justify="left"
    )
    for name in ("", "what", "at most", "median", "worst", "which"):
        limits.add_column(name, justify="left" if name in ("", "what", "which") else "right")
    for row in rows(outcome):
        limits.add_row(
            "ok" if row.held else "SHORT",
            row.limit.what,
            f"{row.limit.most:.2f}",
            f"{row.middle:.3f}",
            f"{row.worst:.3f}",
            row.at,
        )
    console.print(limits)
    attempts = sum(len(send.attempts) for send in ledger.sends)
    acknowledged = sum(bool(send.acknowledged) for send in ledger.sends)
    refused = sum(send.refused for send in ledger.sends)
    console.print(
        f"sends {len(ledger.sends)} in {attempts} attempts: {acknowledged} acknowledged, "
        f"{refused} refused, {len(ledger.sends) - acknowledged - refused} unknown; "
        f"deliveries {ledger.deliveries} over "
        f"{sum(len(reader.sessions) for reader in ledger.readers)} connections"
    )
    if ledger.past:
        console.print(
            f"{len(ledger.past)} times restored to an earlier point: "
            f"{taken_back(ledger)} acknowledged messages were of the time after the backup"
        )
    if waited := outcome.waited:
        console.print(
            f"acknowledged, and shown on streams that were there, faults aside: p99 "
            f"{percentile(waited, 0.99):.3f} s, worst {waited[-1]:.3f} s "
            f"(at most {SEEN_SECONDS:.0f})"
        )
    before, after = outcome.before, outcome.after
    console.print(
        "servers before -> after: "
        + ", ".join(
            f"{name} {was:.0f} -> {now:.0f}"
            for name, was, now in zip(Usage._fields, before, after, strict=True)
        )
        + f"; {outcome.silences} times no heartbeat came; the machine was {outcome.busy:.0f} % busy"
    )
    for leak in outcome.leaks:
        console.print(f"LEAK {leak}")
    said = ", ".join(f"{event} {count}" for event, count in outcome.complaints.most_common())
    console.print(f"in the servers' logs: {said or 'no warning'}")
    if outcome.defects:
        console.print(f"DEFECTS of ours: {', '.join(outcome.defects)}")
    for violation in outcome.violations[:20]:
        console.print(f"VIOLATION {violation}")
    kinds = Counter(violation.kind for violation in outcome.violations)
    each = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    console.print(f"violations: {len(outcome.violations)}" + (f" ({each})" if each else ""))


def _worst(times: Sequence[Times], index: int) -> str:
    values = [value for each in times if (value := each[index]) is not None]
    return f"{max(values):.2f}" if values else ""
