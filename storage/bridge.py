"""The asyncio loop that psycopg lives on, and the only way into it.

psycopg speaks asyncio; everything else here is Trio. One trio-asyncio loop per worker is opened
with the application and shared. Requests run in tasks that Hypercorn made
before or beside that loop, so the loop is named on every call rather than looked up.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import psycopg.waiting
import trio_asyncio
from trio_asyncio._loop import current_loop

T = TypeVar("T")
P = ParamSpec("P")


class Bridge:
    """Calls asyncio-flavoured functions from Trio tasks."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    async def run(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await `function(*args)` on the loop.

        Cancelling the Trio scope cancels the asyncio task and waits for it: the callers see to
        it that a driver cannot wait long then (see `postgres.pool`).
        """
        token = current_loop.set(self._loop)
        try:
            result: T = await trio_asyncio.aio_as_trio(function, loop=self._loop)(*args, **kwargs)
            return result
        finally:
            current_loop.reset(token)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """Open the loop for as long as the block lasts.

    Raises:
        RuntimeError: psycopg was imported before `storage`; see there.
    """
    if psycopg.waiting.get_running_loop is not asyncio.get_running_loop:  # type: ignore[attr-defined]
        raise RuntimeError("import storage before psycopg")
    async with trio_asyncio.open_loop() as loop:
        yield Bridge(loop)
