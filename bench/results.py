"""What was measured: samples, and one JSON file per run that holds them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.statistics import Summary, median, summarize


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One subject, measured once."""

    scenario: str
    subject: str
    case: str
    """What was varied within the scenario: streams, load, warm or cold."""
    processes: int = 1
    round: int = 0
    values: dict[str, float]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All of `python -m bench run`."""

    began: str
    """ISO 8601, UTC."""
    quick: bool
    rounds: int
    machine: dict[str, str]
    absent: dict[str, str]
    """Subjects that were left out, and why."""
    failed: list[str]
    """Measurements that were given up, and why."""
    samples: list[Sample]


class Results:
    """Samples, and the figures over their rounds."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def values(
        self, scenario: str, subject: str, case: str, value: str, *, processes: int = 1
    ) -> list[float]:
        """Of each round that has it."""
        return [
            sample.values[value]
            for sample in self._samples
            if (sample.scenario, sample.subject, sample.case, sample.processes)
            == (scenario, subject, case, processes)
            and value in sample.values
        ]

    def summary(
        self, scenario: str, subject: str, case: str, value: str, *, processes: int = 1
    ) -> Summary | None:
        found = self.values(scenario, subject, case, value, processes=processes)
        return summarize(found) if found else None

    def median(
        self, scenario: str, subject: str, case: str, value: str, *, processes: int = 1
    ) -> float | None:
        found = self.values(scenario, subject, case, value, processes=processes)
        return median(found) if found else None

    def subjects(self, scenario: str) -> list[str]:
        """In the order in which they were first measured."""
        return _unique(s.subject for s in self._samples if s.scenario == scenario)

    def cases(self, scenario: str, *, processes: int = 1) -> list[str]:
        return _unique(
            s.case for s in self._samples if s.scenario == scenario and s.processes == processes
        )


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def write_run(run: Run, folder: Path) -> Path:
    """`<folder>/<time>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.began.replace(':', '')}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
    return path


def read_run(path: Path) -> Run:
    return msgspec.json.decode(path.read_bytes(), type=Run)


def newest(folder: Path) -> Path | None:
    """The names sort by time."""
    runs: Sequence[Path] = sorted(folder.glob("*.json"))
    return runs[-1] if runs else None
