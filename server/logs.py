"""Log lines: events with fields, and nothing that a person wrote or a secret could be in.

The last line of defence stands here: of an exception only its kind and place is told, of a
library's log record not even the message, and a field that is neither a number, a string nor a
plain collection of them is told by its type.
"""

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import NoneType, TracebackType
from typing import Any, Literal
from uuid import UUID

import msgspec
import structlog
import trio

from storage.failures import describe

Event = dict[str, Any]

PIPE_BYTES = 4096
"""What Linux promises of a pipe that it calls writable (pipe(7)); a line takes less."""
MAX_GATHERED = 256
"""Lines that wait for the end of the loop's turn."""

_PLAIN = frozenset({str, int, float, bool, NoneType})


def configure_logging(
    format: Literal["json", "console"],  # noqa: A002
    level: str,
) -> trio.abc.Instrument:
    """Send every log line of this process to one place, ours and the libraries'.

    Args:
        format: `json`, one object per line on standard output: `at`, `level`, `event`, `worker`
            (the process id) and the event's fields; or `console`, for people, on standard error.
        level: the least that is written: debug, info, warning or error.

    Returns:
        For `trio.run`: with it, the lines of one turn of the loop are written together.
    """
    fd = 1 if format == "json" else 2
    render = _to_json if format == "json" else _to_console(colors=os.isatty(fd))
    processors: list[Any] = [_complete, render]
    lines = _Lines(fd)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=lines,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [_Libraries()]
    root.setLevel(logging.WARNING)
    return lines


def hide_uncaught_exceptions() -> None:
    """What Python itself would print with its text becomes an event: for a worker process."""

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        structlog.get_logger("python").error("thread_failed", exc_info=failure.exc_value)

    def failed(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        structlog.get_logger("python").critical("process_failed", exc_info=error)

    def ignored(failure: Any) -> None:
        structlog.get_logger("python").error("exception_ignored", exc_info=failure.exc_value)

    threading.excepthook = thread_failed
    sys.excepthook = failed
    sys.unraisablehook = ignored


class _Line:
    """What structlog calls at the end, with the finished line."""

    def __init__(
        self, name: str, write: Callable[[bytes], None], write_soon: Callable[[bytes], None]
    ) -> None:
        self.name = name
        self.debug = self.info = write_soon
        self.msg = self.warning = self.error = self.critical = write
        self.exception = self.fatal = self.warn = self.log = self.failure = write


class _Lines(trio.abc.Instrument):
    """Makes the loggers and writes their lines to one file descriptor.

    A line that cannot be written is dropped and counted: a full disk, a pipe that nobody reads
    any more or reads too slowly must not hold up or end what is being logged.

    While Trio runs, what only informs is gathered for a turn of its loop, and written before the
    loop waits: a turn of a busy worker has dozens of lines, and with two calls for each a send
    took 296 us of CPU in place of 254. A warning is written at once, with all that came before it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._dropped = 0
        self._gathered: list[bytes] = []
        self._gathers = False

    def __call__(self, *names: str) -> _Line:
        return _Line(names[0] if names else "server", self._write, self._write_soon)

    # Trio's

    def before_run(self) -> None:
        self._gathers = True

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        if self._gathered:
            self._flush()

    def after_run(self) -> None:
        self._gathers = False
        self._flush()

    def _write_soon(self, line: bytes) -> None:
        self._gathered.append(line)
        if not self._gathers or len(self._gathered) >= MAX_GATHERED:
            self._flush()

    def _write(self, line: bytes) -> None:
        self._gathered.append(line)
        self._flush()

    def _flush(self) -> None:
        lines, self._gathered = self._gathered, []
        if self._dropped and self._try(_to_json(None, "", _dropped(self._dropped))):
            self._dropped = 0
        start, size = 0, 0
        for end, line in enumerate([*lines, b""]):
            if end > start and (size + len(line) > PIPE_BYTES or end == len(lines)):
                if not self._try(b"".join(lines[start:end])):
                    self._dropped += end - start
                start, size = end, 0
            size += len(line)

    def _try(self, data: bytes) -> bool:
        try:
            # A pipe is writable while so much is free: so the write does not wait for the reader.
            # O_NONBLOCK would also be the shell's.
            if not select.select((), (self._fd,), (), 0)[1]:
                return False
            return os.write(self._fd, data) == len(data)
        except (OSError, ValueError):
            return False


def _dropped(lines: int) -> Event:
    return {
        "at": _now(),
        "level": "warning",
        "event": "log_lines_dropped",
        "worker": _pid,
        "lines": lines,
    }


_pid = os.getpid()

_second = (-1, "")
"""The last second that was named, and its name: most lines fall into the same."""


def _now() -> str:
    global _second
    now = time.time()
    whole = int(now)
    number, name = _second
    if number != whole:
        name = f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}"
        _second = (whole, name)  # both at once: another thread may be here too
    return f"{name}.{int((now - whole) * 1000):03d}Z"


def _complete(logger: Any, method: str, event: Event) -> Event:
    """The line's fields in their order; of each value only what is plain."""
    line = {
        "at": _now(),
        "level": "error" if method == "exception" else method,
        "event": _plain(event.pop("event", "")),
        "logger": getattr(logger, "name", "server"),
        "worker": _pid,
    }
    if "exc_info" in event or "stack_info" in event:
        event |= _describe_exception(event)
    for name, value in event.items():
        line[name] = value if type(value) in _PLAIN else _plain(value)
    return line


def _describe_exception(event: Event) -> dict[str, Any]:
    error = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    return describe(error) if isinstance(error, BaseException) else {}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, UUID):
        return str(value)
    return f"<{type(value).__name__}>"


def _to_json(_: Any, __: str, event: Event) -> bytes:
    try:
        return msgspec.json.encode(event) + b"\n"
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        # A lone surrogate, say. That there was something to log must not be lost.
        return msgspec.json.encode({"at": event["at"], "event": "unprintable_event"}) + b"\n"


def _to_console(*, colors: bool) -> Callable[[Any, str, Event], bytes]:
    console = structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="at", pad_event_to=0)

    def render(logger: Any, method: str, event: Event) -> bytes:
        line = console(logger, method, event)
        return line.encode("utf-8", "backslashreplace") + b"\n"

    return render


class _Libraries(logging.Handler):
    """Log records of libraries: who, how bad, where and what kind of exception. Their texts
    hold URLs, parameters and rows."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        structlog.get_logger(record.name).log(
            record.levelno,
            "library_event",
            error=type(error).__name__ if error else None,
            where=f"{record.filename}:{record.lineno}",
        )
