"""What issue 3 asks for, and whether a run has it. Every line is computed from the samples."""

from collections.abc import Callable
from typing import NamedTuple

from bench.results import Results
from bench.scenarios import connect, fanout, idle, pairs, requests

MAIN = fanout.case_of(fanout.MAIN)
LATENCY = "50 % of the maximum"
MEMORY_CASES = ("10000 streams", "1000 streams")
"""The first that was measured: with few streams the allocator's steps blur it."""


class Line(NamedTuple):
    """One requirement.

    Attributes:
        what: is measured, in words.
        least: what must be reached, in words.
        reached: in words; empty where it was not measured.
        met: None where it was not measured.
        hoped: what it reaches for beyond that, and whether it does; empty where there is none.
    """

    what: str
    least: str
    reached: str
    met: bool | None
    hoped: str = ""


def verdict(results: Results) -> list[Line]:
    """The table of the issue, in its order."""
    return [
        *_fanout(results),
        _memory(results),
        _connects(results),
        *_posts(results),
        _sends(results),
        *_latency(results),
        *_cost(results),
        _quiet(results),
    ]


def _line(
    what: str,
    least: str,
    value: float | None,
    met: Callable[[float], bool],
    show: Callable[[float], str],
    hoped: tuple[str, Callable[[float], bool]] | None = None,
) -> Line:
    if value is None:
        return Line(what, least, "", None)
    hope = f"{hoped[0]}: {'yes' if hoped[1](value) else 'no'}" if hoped else ""
    return Line(what, least, show(value), met(value), hope)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _fanout(results: Results) -> list[Line]:
    def rate(subject: str) -> float | None:
        return results.median(fanout.NAME, subject, MAIN, "events_per_second")

    ours = rate("sottovoce")
    what = "fan-out, 1,000 streams"
    lines = [
        _line(what, "1.0 × nchan", _ratio(ours, rate("nchan")), lambda r: r >= 1.0, _times),
        _line(
            what,
            "5 × sse-starlette",
            _ratio(ours, rate("sse-starlette")),
            lambda r: r >= 5.0,
            _times,
        ),
    ]
    limit = _ratio(ours, rate("write-c"))
    if limit is not None:
        hope = f"0.5 × the write loop: {'yes' if limit >= 0.5 else 'no'} ({limit:.2f} ×)"
        lines[0] = lines[0]._replace(hoped=hope)
    return lines


def _memory(results: Results) -> Line:
    found = None
    for case in MEMORY_CASES:
        found = results.median(idle.NAME, "sottovoce", case, "rss_kb")
        if found is not None:
            break
    return _line(
        "quiet authenticated stream",
        "at most 12 kB RSS",
        found,
        lambda kb: kb <= 12.0,
        lambda kb: f"{kb:.1f} kB",
        ("10 kB", lambda kb: kb <= 10.0),
    )


def _quiet(results: Results) -> Line:
    case = f"{idle.QUIET_AT} streams"
    return _line(
        "10,000 quiet streams, heartbeats and looks at access included",
        "under 2 % of a core",
        results.median(idle.NAME, "sottovoce", case, "quiet_cores"),
        lambda cores: cores < 0.02,
        lambda cores: f"{cores * 100:.1f} %",
    )


def _connects(results: Results) -> Line:
    return _line(
        "new authenticated streams with history",
        "3,000 /s",
        results.median(connect.NAME, "sottovoce", "new streams", "streams_per_second"),
        lambda rate: rate >= 3000,
        _per_second,
        ("5,000 /s", lambda rate: rate >= 5000),
    )


def _posts(results: Results) -> list[Line]:
    def rate(subject: str) -> float | None:
        return results.median(requests.NAME, subject, requests.CASE, "posts_per_second")

    what, ours, uvicorn = "POSTs through the engine", rate("engine"), rate("uvicorn")
    first = _line(what, "20,000 /s", ours, lambda r: r >= 20_000, _per_second)
    if ours is not None and uvicorn is not None:
        first = first._replace(
            hoped=f"uvicorn's {_per_second(uvicorn)}: {'yes' if ours >= uvicorn else 'no'}"
        )
    ratio = _ratio(ours, rate("hypercorn"))
    return [first, _line(what, "8 × stock Hypercorn", ratio, lambda r: r >= 8.0, _times)]


def _sends(results: Results) -> Line:
    """With as many workers as serve the whole machine better."""
    rates = [
        rate
        for processes in (1, 2)
        if (
            rate := results.median(
                pairs.NAME, "sottovoce", pairs.MAXIMUM, "sends_per_second", processes=processes
            )
        )
        is not None
    ]
    return _line(
        "durable sends, each to two streams, whole machine",
        "3,000 /s",
        max(rates, default=None),
        lambda rate: rate >= 3000,
        _per_second,
        ("6,000 /s", lambda rate: rate >= 6000),
    )


def _latency(results: Results) -> list[Line]:
    what = "send to delivery at half load"

    def at(value: str) -> float | None:
        return results.median(pairs.NAME, "sottovoce", LATENCY, value)

    return [
        _line(what, "p50 < 5 ms", at("p50_ms"), lambda ms: ms < 5.0, _milliseconds),
        _line(what, "p99 < 30 ms", at("p99_ms"), lambda ms: ms < 30.0, _milliseconds),
    ]


def _cost(results: Results) -> list[Line]:
    few, many = idle.COST_LEVELS

    def cpu(level: int) -> float | None:
        return results.median(idle.NAME, "sottovoce", idle.COST.format(level), "cpu_us_per_event")

    def memory(level: int) -> float | None:
        return results.median(idle.NAME, "sottovoce", f"{level} streams", "rss_kb")

    what = "cost per stream at 18,000 against 1,000"
    return [
        _line(
            f"{what}: {name}",
            "at most 1.10 ×",
            _ratio(of(many), of(few)),
            lambda ratio: ratio <= 1.10,
            _times,
        )
        for name, of in (("CPU of an event", cpu), ("memory", memory))
    ]


def _per_second(rate: float) -> str:
    return f"{rate:,.0f} /s"


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms"
