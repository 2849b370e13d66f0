"""Charts of a run's course, as SVG: in Locust's HTML report and beside its web page. Pure.

Locust draws requests a second, response times and users by itself; it has no place for other
charts, but takes pages and tables of ours.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from loadtest.course import Mark, Row

WIDTH, HEIGHT = 900, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 46, 40
COLOURS = ("#0b6e4f", "#3b5b92")
MARKED, GRID = "#c1440e", "#808080"
TICKS = 4
"""At least half as many, at round numbers."""
ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    """Seconds, value."""


class Chart(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]
    least: float = 0.0
    """Where the axis begins."""


def charts_of(rows: Sequence[Row], figures: dict[str, float]) -> list[Chart]:
    """The four that tell a run; a title says what is to be seen."""
    if not rows:
        return []

    def line(label: str, name: str) -> Line:
        values = ((row.at, getattr(row, name)) for row in rows)
        return Line(label, [(at, value) for at, value in values if value is not None])

    lost, expected = figures.get("lost", 0), figures.get("expected", 0)
    made = (
        f"{lost:,.0f} of {expected:,.0f} deliveries that were owed were not made"
        if lost
        else f"All {expected:,.0f} deliveries that were owed were made"
    )
    rates = [row.rate for row in rows if row.rate is not None]
    p99 = figures.get("delivery_p99_ms")
    return [
        Chart(
            f"Up to {figures.get('streams_open_most', 0):,.0f} streams were open",
            "streams, users",
            [line("streams open", "open"), line("users", "users")],
        ),
        Chart(
            made,
            "% of what came due in that second",
            [line("delivery rate", "rate")],
            least=min([99.0, *rates]) if rates else 0.0,
        ),
        Chart(
            "From sending to receiving"
            + ("" if p99 is None else f": {p99:,.0f} ms or less for 99 % of the deliveries"),
            "ms, of the last 10 s",
            [line("p50", "p50"), line("p99", "p99")],
        ),
        Chart(
            f"{figures.get('sends', 0):,.0f} messages were sent, "
            f"{figures.get('deliveries', 0):,.0f} events received",
            "per second",
            [line("sent", "sends"), line("received", "deliveries")],
        ),
        Chart(
            f"The generator took {figures.get('generator_cpu_percent', 0):.0f} % of a core "
            f"and was {figures.get('generator_lag_p99_ms', 0):.0f} ms late at p99",
            "% of a core; ms",
            [line("CPU, %", "cpu"), line("lag, ms", "lag")],
        ),
    ]


def draw(charts: Sequence[Chart], marks: Sequence[Mark]) -> str:
    """All of them, one below the other."""
    return "\n".join(_draw(chart, marks) for chart in charts)


def _draw(chart: Chart, marks: Sequence[Mark]) -> str:
    points = [point for line in chart.lines for point in line.points]
    last = max((at for at, _ in points), default=1.0) or 1.0
    values = ticks(chart.least, max((value for _, value in points), default=chart.least))
    least, most = values[0], values[-1]

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(at, last) / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - least) / (most - least)

    parts = [
        _text(LEFT, 16, chart.title, size=14),
        _text(4, TOP - 10, chart.unit),
        _text(WIDTH - RIGHT, HEIGHT - 4, "seconds", anchor="end"),
    ]
    for value in values:
        parts.append(_path([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], GRID, width=0.5))
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:,.5g}", anchor="end"))
    parts.extend(
        _text(x(at), HEIGHT - BOTTOM + 16, f"{at:,.5g}", anchor="middle")
        for at in ticks(0.0, last)
        if at <= last
    )
    for mark in marks:
        parts.append(_path([(x(mark.at), TOP), (x(mark.at), HEIGHT - BOTTOM)], MARKED))
        parts.append(_text(x(mark.at), TOP - 4, mark.what, colour=MARKED, anchor="middle"))
    for number, (line, colour) in enumerate(zip(chart.lines, COLOURS, strict=False)):
        parts.append(_path([(x(at), y(value)) for at, value in line.points], colour, width=1.6))
        where = WIDTH - RIGHT - 120 * (len(chart.lines) - number - 1)
        parts.append(_text(where, TOP - 10, line.name, colour=colour, anchor="end"))
    style = f"width:100%;max-width:{WIDTH}px;font:12px sans-serif"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">{"".join(parts)}</svg>'


def ticks(least: float, most: float) -> list[float]:
    """Round numbers from `least` or below to `most` or above, a quarter or more apart."""
    span = max(most - least, 1.0)
    size = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(size * number for number in ROUND if size * number * TICKS >= span * 0.999)
    first = math.floor(least / step + 1e-9)
    last = max(first + 1, math.ceil(most / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    colour: str = "currentColor",
    anchor: str = "start",
    size: int = 12,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size}">{html.escape(text)}</text>'
    )


def _path(points: Sequence[tuple[float, float]], colour: str, *, width: float = 1.0) -> str:
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
