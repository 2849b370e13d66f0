"""Where a worker keeps what it counts, so that any worker can answer for all of them.

prometheus_client keeps each worker's values in memory-mapped files of a shared folder. It makes
them longer without asking for their blocks: on a disk that is full the next count is then not an
error but SIGBUS, which ends the worker. Here every block is reserved before it is mapped. Without
room, values are kept in memory alone: the server goes on, and its metrics are incomplete.
"""

import errno
import os
import time
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which prometheus_client is told the folder."""
NUMBER = "PROMETHEUS_MULTIPROC_NUMBER"
"""Ours: which of the folder's files are this worker's. Numbers are given again after a worker's
death, and its counts go on in them, so that the folder has a bounded size and a scrape a bounded
time, however many workers came and went."""

KINDS = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
"""The kinds of metrics, as prometheus_client names their files."""
FILE_BYTES = 64 * 1024
"""How long one file is at first; it is doubled as needed. A worker's five files take 320 kB at
first, and 768 kB once every statement, route and status was seen."""
RETRY_SECONDS = 5.0
"""How long a file on a full disk is left before it is made longer again: each attempt is
a system call, in the middle of a request."""

log = structlog.get_logger("metrics")


class ReservedDict(MmapedDict):
    """prometheus_client's values by key in one file, whose blocks are all reserved."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._retry_at = 0.0
        super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]

    def read_value(self, key: str) -> Any:
        """(value, time stamp); zeros where the key has no room yet."""
        if key in self._positions or self._has_room(key):
            return super().read_value(key)  # type: ignore[no-untyped-call]
        return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Keep a value. Without room for its key nothing is kept: the caller has the sum, and
        writes all of it the next time."""
        if key in self._positions or self._has_room(key):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]

    def _has_room(self, key: str) -> bool:
        """Whether a new key fits; the file is made longer for it."""
        capacity = self._capacity
        needed = self._used + len(key.encode()) + 32  # the length, padding and two doubles
        if needed <= capacity:
            return True
        if time.monotonic() < self._retry_at:
            return False
        while capacity < needed:
            capacity *= 2
        try:
            os.posix_fallocate(self._f.fileno(), 0, capacity)
        except OSError as error:
            if not self._retry_at:
                log.warning("metrics_incomplete", reason=_name(error))
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True


def share_values() -> str | None:
    """Settle where this process keeps its values. Call it before the first metric is made.

    Returns:
        None; or why they cannot be shared with other workers, as the name of an errno: then they
        are kept in memory, and nobody but this process shows them.
    """
    if FOLDER not in os.environ:
        return None
    # The library asks for the process's number at each count, for servers that fork. Ours start
    # their workers anew, and a send counts ten times.
    number = os.environ.get(NUMBER) or str(os.getpid())
    try:
        for kind in KINDS:
            _reserve(Path(os.environ[FOLDER], f"{kind}_{number}.db"))
    except OSError as error:
        del os.environ[FOLDER]
        values.ValueClass = values.MutexValue
        return _name(error)
    values.MmapedDict = ReservedDict  # type: ignore[attr-defined]
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: number)  # type: ignore[no-untyped-call]
    return None


def _reserve(file: Path) -> None:
    """Make a file with all its blocks, or leave none. Raises: OSError."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        os.posix_fallocate(descriptor, 0, max(size, FILE_BYTES))
    except OSError:
        file.unlink(missing_ok=True)  # an empty one would break everybody's scrape
        raise
    finally:
        os.close(descriptor)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown")
