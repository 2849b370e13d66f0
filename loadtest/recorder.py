"""The run as a whole, in the process that reports it: Locust's own, or its master.

Workers report their tallies with what they report anyway; durations and gauges are in Locust's
statistics, which add up by themselves.
"""

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from locust.env import Environment

from loadtest.course import Mark, Row
from loadtest.figures import (
    CONNECT,
    CPU,
    DELIVERY,
    FIRST_EVENT,
    GAUGE,
    LAG,
    MEMORY,
    OPEN,
    POST,
    RATE,
    RECONNECT,
    SEND,
    STREAM,
)
from loadtest.ledger import Tally

MOST_ROWS = 1_200
"""Of the run's course; when there are more, every second one is dropped, and from then on half
as many are kept: as many as a chart has pixels."""


class Recorder:
    """
    Attributes:
        rows: the course of the run.
        marks: what was done, and when.
        held_users: of a search in steps: the most that met the objectives; None if it is none.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.begin()

    def begin(self) -> None:
        """A new run."""
        self.rows: list[Row] = []
        self.marks: list[Mark] = []
        self.held_users: int | None = None
        self._began = time.monotonic()
        self._tallies: dict[str, Tally] = {}
        self._open: dict[str, int] = {}
        self._before, self._before_at = Tally(), self._began
        self._looked = Tally()
        self._every = 1
        self._seconds = 0
        self._most_open = 0

    @property
    def tally(self) -> Tally:
        total = Tally()
        for tally in self._tallies.values():
            total = total.plus(tally)
        return total

    @property
    def open(self) -> int:
        return sum(self._open.values())

    def note(self, process: str, tally: Tally, streams: int) -> None:
        """What a process has counted since the run began."""
        self._tallies[process] = tally
        self._open[process] = streams

    def mark(self, what: str) -> None:
        self.marks.append(Mark(time.monotonic() - self._began, what))

    def record(self) -> None:
        """Once a second."""
        now, tally = time.monotonic(), self.tally
        seconds = max(1e-3, now - self._before_at)
        expected = tally.expected - self._before.expected
        rate = 100 * (tally.delivered - self._before.delivered) / expected if expected else None
        stats = self._environment.stats
        self._most_open = max(self._most_open, self.open)
        stats.get(OPEN, GAUGE).log(self.open, 0)
        if rate is not None:
            stats.get(RATE, GAUGE).log(rate, 0)
        delivery = stats.get(DELIVERY, STREAM)
        row = Row(
            at=now - self._began,
            users=self._environment.runner.user_count if self._environment.runner else 0,
            open=self.open,
            sends=(tally.sends - self._before.sends) / seconds,
            deliveries=(tally.shown - self._before.shown) / seconds,
            rate=rate,
            p50=delivery.get_current_response_time_percentile(0.5),
            p99=delivery.get_current_response_time_percentile(0.99),
            cpu=_lately(stats.get(CPU, GAUGE)),
            lag=_lately(stats.get(LAG, GAUGE)),
        )
        self._before, self._before_at = tally, now
        if self._seconds % self._every == 0:
            self.rows.append(row)
        self._seconds += 1
        if len(self.rows) > MOST_ROWS:
            self.rows = self.rows[::2]
            self._every *= 2

    def look_again(self) -> None:
        """`lately` begins here."""
        self._looked = self.tally

    def lately(self) -> dict[str, float]:
        """What objectives look at, since `look_again`; times are of the last ten seconds."""
        found = _counts(self.tally.minus(self._looked))
        stats = self._environment.stats
        for name, entry, share in (
            ("delivery_p99_ms", stats.get(DELIVERY, STREAM), 0.99),
            ("generator_lag_p99_ms", stats.get(LAG, GAUGE), 0.99),
            ("generator_cpu_percent", stats.get(CPU, GAUGE), 0.5),
        ):
            value = entry.get_current_response_time_percentile(share)
            if value is not None:
                found[name] = value
        return found

    def figures(self) -> dict[str, float]:
        """Of the whole run, by the names that objectives use. Times are in milliseconds; what
        was never measured is not there."""
        stats = self._environment.stats
        found = {
            "seconds": time.monotonic() - self._began,
            "streams_open_most": float(self._most_open),
            **_counts(self.tally),
        }
        for name, key in {
            "connect": (CONNECT, STREAM),
            "first_event": (FIRST_EVENT, STREAM),
            "reconnect": (RECONNECT, STREAM),
            "delivery": (DELIVERY, STREAM),
            "send": (SEND, POST),
        }.items():
            entry = stats.entries.get(key)  # looking alone would make an empty one
            if entry is not None and entry.response_times:
                for label, share in {"p50": 0.5, "p99": 0.99, "p999": 0.999}.items():
                    found[f"{name}_{label}_ms"] = entry.get_response_time_percentile(share)
                found[f"{name}_max_ms"] = entry.max_response_time
        cpu, lag, memory = (stats.get(name, GAUGE) for name in (CPU, LAG, MEMORY))
        if cpu.response_times:
            found["generator_cpu_percent"] = cpu.avg_response_time
            found["generator_cpu_most_percent"] = cpu.max_response_time
            found["generator_lag_p99_ms"] = lag.get_response_time_percentile(0.99)
            found["generator_memory_mb"] = memory.max_response_time
        if self.held_users is not None:
            found["held_users"] = self.held_users
        return found


def of_worker(report: Mapping[str, Any]) -> tuple[Tally, int]:
    """What `to_master` made."""
    return msgspec.convert(report["tally"], type=Tally), int(report["open"])


def to_master(tally: Tally, streams: int) -> dict[str, Any]:
    return {"tally": msgspec.to_builtins(tally), "open": streams}


def _counts(tally: Tally) -> dict[str, float]:
    return {
        "connects": tally.connects,
        "connect_failures_percent": _percent(tally.connect_failures, tally.connects),
        "reconnects": tally.reconnects,
        "ended_by_server": tally.ended_by_server,
        "sends": tally.sends,
        "send_failures_percent": _percent(tally.send_failures, tally.sends + tally.send_failures),
        "deliveries": tally.shown,
        "expected": tally.expected,
        "lost": tally.lost,
        "delivery_percent": tally.delivery_percent,
        "duplicates": tally.duplicates,
        "gaps": tally.gaps,
        "reorderings": tally.reorderings,
        "leaks": tally.leaks,
        "lost_heartbeats": tally.lost_heartbeats,
        "resets": tally.resets,
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _lately(entry: Any) -> float:
    """The average of the last ten seconds' values, or of all if there are fewer."""
    return float(entry.get_current_response_time_percentile(0.5) or 0.0)
