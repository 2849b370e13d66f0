"""What a run must reach, and whether it did. Pure, but for reading the file."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("objectives.toml")
GENERATOR_CPU_PERCENT = 90.0
"""Of a core, on average: above it the generator has no room for what comes unevenly."""
GENERATOR_LAG_MS = 50.0
"""By which its own loop is late, at p99: that much is in its figures and not the server's."""
TIMES = "_ms"
"""Figures that end so are times, and worth nothing if the generator was the limit."""


class Objective(NamedTuple):
    figure: str
    at_least: bool
    """Else: at most."""
    limit: float

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.figure} {'>=' if self.at_least else '<='} {self.limit:g}"


class Judged(NamedTuple):
    objective: Objective
    value: float | None
    """None: it was not measured, which is not reaching it."""

    @property
    def met(self) -> bool:
        return self.value is not None and self.objective.met(self.value)


class Verdict(NamedTuple):
    """
    Attributes:
        generator: why the generator was the limit; empty if it was not.
    """

    judged: Sequence[Judged]
    generator: str

    @property
    def missed(self) -> list[Judged]:
        return [each for each in self.judged if not each.met]

    @property
    def blamed(self) -> list[Judged]:
        """Of what was missed, what is the server's."""
        if not self.generator:
            return self.missed
        return [each for each in self.missed if not each.objective.figure.endswith(TIMES)]

    @property
    def exit_code(self) -> int:
        """0, or 1: an objective was missed, or 3: only such as the generator itself may have."""
        if self.blamed:
            return 1
        return 3 if self.missed else 0


def read_objectives(file: Path, scenario: str) -> list[Objective]:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is not like `objectives.toml`.
    """
    found = tomllib.loads(file.read_text())
    own = found.get(scenario, {})
    return [
        Objective(figure, key == "at_least", _number(limit))
        for key in ("at_least", "at_most")
        for figure, limit in {**_table(found, key), **_table(own, key)}.items()
    ]


def judge(objectives: Sequence[Objective], figures: Mapping[str, float]) -> Verdict:
    """
    Args:
        figures: by name; `generator_cpu_percent` and `generator_lag_p99_ms` are the generator's.
    """
    return Verdict(
        [Judged(each, figures.get(each.figure)) for each in objectives], generator_limit(figures)
    )


def generator_limit(figures: Mapping[str, float]) -> str:
    """Why the generator, not the server, was the limit; empty if it was not."""
    cpu = figures.get("generator_cpu_percent", 0.0)
    lag = figures.get("generator_lag_p99_ms", 0.0)
    if cpu > GENERATOR_CPU_PERCENT:
        return f"it took {cpu:.0f} % of a core (over {GENERATOR_CPU_PERCENT:.0f})"
    if lag > GENERATOR_LAG_MS:
        return f"its own loop was {lag:.0f} ms late at p99 (over {GENERATOR_LAG_MS:.0f})"
    return ""


def _table(tables: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = tables.get(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{key} is no table")
    return table


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a limit is a number")
    return float(value)
