"""How a failure is told in a log line (where and what kind, never its text), and survived.

Drivers put values into their messages (the row that violated a constraint, the URL that could
not be reached), so `str(error)` is PHI or a secret until proved otherwise.
"""

import traceback
from collections.abc import Awaitable, Callable
from pathlib import PurePath

import structlog
import trio

log = structlog.get_logger("storage")

RESTART_SECONDS = 1.0


def describe(error: BaseException) -> dict[str, object]:
    """Fields for a log line: the type, the SQLSTATE where there is one, and the innermost calls."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    fields: dict[str, object] = {
        "error": type(error).__name__,
        "where": [f"{PurePath(f.filename).name}:{f.lineno} {f.name}" for f in frames],
    }
    if isinstance(sqlstate := getattr(error, "sqlstate", None), str):
        fields["sqlstate"] = sqlstate
    if isinstance(error, BaseExceptionGroup):
        fields["errors"] = [type(inner).__name__ for inner in error.exceptions]
    return fields


async def keep_running(name: str, serve: Callable[[], Awaitable[None]]) -> None:
    """Run a background task until cancelled: a defect in it costs a log line and a second, not
    the worker."""
    while True:
        try:
            await serve()
        except Exception as error:
            log.error("task_failed", task=name, **describe(error))
        await trio.sleep(RESTART_SECONDS)
