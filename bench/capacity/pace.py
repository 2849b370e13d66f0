"""How fast the machine is meanwhile: a fixed piece of work on each core, 25 times a second.

Others on the same host take caches, memory and turns from this machine, and it cannot see them:
the same work then takes up to half as much CPU time again, for seconds or for minutes. A window
that met them says more about them than about the server.
"""

import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from bench.capacity.points import Measured
from bench.statistics import median, percentile

PAUSE_SECONDS = 0.04
PACE = "pace of core "
"""How what was found is named among a window's values: µs of CPU for the piece of work."""
FAST = 0.2
"""The share of the windows that are faster than what counts as the machine's own pace."""
CALM = 1.12
"""Over it by so much a core may be."""
LEAST_CALM = 2
"""Windows of a load that count, though it had none that was calm: the calmest."""
END_SECONDS = 5.0

_SAMPLE = struct.Struct("<dd")

Values = Mapping[str, float]


class Pace(Protocol):
    """Tells the pace of each core."""

    def between(self, began: float, ended: float) -> dict[str, float]:
        """By `PACE` and the core: the median from one moment of `time.perf_counter` to another."""


class Sampler:
    """Measures the pace of some cores while the block lasts."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = sorted(set(cores))
        self._folder = tempfile.TemporaryDirectory(prefix="sottovoce-pace-")
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Sampler":
        for core in self._cores:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "bench.capacity.pace", str(core), str(self._of(core))],
                    stdin=subprocess.PIPE,  # its end is ours
                )
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def between(self, began: float, ended: float) -> dict[str, float]:
        """See `Pace`.

        Raises:
            IndexError: nothing was measured then.
        """
        found = {}
        for core in self._cores:
            data = self._of(core).read_bytes()
            whole = len(data) - len(data) % _SAMPLE.size
            took = [
                seconds * 1e6
                for moment, seconds in _SAMPLE.iter_unpack(data[:whole])
                if began <= moment <= ended
            ]
            found[f"{PACE}{core}"] = median(took)
        return found

    def _of(self, core: int) -> Path:
        return Path(self._folder.name) / str(core)


def slowness(values: Values, others: Sequence[Values]) -> float:
    """Of the slowest core, over its pace in the fast ones of other windows: 1.1 is a tenth more."""
    return max(
        values[name] / percentile(sorted(each[name] for each in others), FAST)
        for name in values
        if name.startswith(PACE)
    )


def calm(measured: Sequence[Measured]) -> list[Measured]:
    """The windows that say something about the server: those in which no core was slow, and of a
    load that has too few of them the calmest."""
    every = [each.values for each in measured]
    loads: dict[str, list[tuple[float, int]]] = {}
    for place, each in enumerate(measured):
        loads.setdefault(each.load.name, []).append((slowness(each.values, every), place))
    kept = [
        place
        for windows in loads.values()
        for rank, (slow, place) in enumerate(sorted(windows))
        if slow <= CALM or rank < LEAST_CALM
    ]
    return [measured[place] for place in sorted(kept)]


def _work(document: object) -> int:
    """About what a server does: decode, look at, build and encode small things."""
    decoded = msgspec.json.decode(msgspec.json.encode(document))
    table = {number: str(number) for number in range(1_200)}
    return len(table) + sum(len(each["text"]) for each in decoded["messages"])


def _sample(core: int, path: Path) -> None:
    """Until standard input ends."""
    os.sched_setaffinity(0, [core])
    document = {
        "messages": [
            {"id": number, "text": "x" * 40, "by": {"id": number, "name": str(number)}}
            for number in range(120)
        ]
    }
    with path.open("ab", buffering=0) as file:
        while not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
            began = time.thread_time()
            _work(document)
            file.write(_SAMPLE.pack(time.perf_counter(), time.thread_time() - began))


if __name__ == "__main__":
    _sample(int(sys.argv[1]), Path(sys.argv[2]))
