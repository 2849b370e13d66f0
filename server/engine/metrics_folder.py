"""The folder in which a supervisor's workers keep what they count (`storage.metric_files`).

It ends with its supervisor, who removes it; if that one was killed, the next supervisor that
starts on this machine does. A lock on the folder says whether its owner lives: the supervisor and
its workers hold it, and the kernel releases it when the last of them has ended, however it ended.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog

PREFIX = "sottovoce-metrics-"
MARK = "locked"
"""A file that says that the folder was locked by its owner. A folder without it was just made, or
is on a file system that has no locks: nothing tells whether its owner lives."""

log = structlog.get_logger("supervisor")


class MetricsFolder(NamedTuple):
    path: Path
    lock: int
    """A descriptor. Each worker inherits it, which keeps the folder locked."""


@contextmanager
def metrics_folder() -> Iterator[MetricsFolder | None]:
    """A folder while the block lasts; None where there can be none, which the log then says.

    What others left behind is removed first.
    """
    try:
        _remove_leftovers(Path(tempfile.gettempdir()))
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # gettempdir: no folder is writable. The server needs none to serve.
        reason = errno.errorcode.get(error.errno or 0, "unknown")
        log.warning("metrics_not_shared", reason=reason)
        yield None
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / MARK).touch()
        yield MetricsFolder(path, lock)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_leftovers(parent: Path) -> None:
    """Remove the folders whose owners have ended. Raises: OSError."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if (path / MARK).exists():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
