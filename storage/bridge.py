"""The asyncio loop that redis-py lives on, and the only way into it.

redis-py speaks asyncio; everything else here is Trio. One trio-asyncio loop per worker is opened
with the store. Each callback on it costs several task switches of Trio: so what goes over is few
and large (a script for a batch, a reader that stays).
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from typing import Any, TypeVar

import trio
import trio_asyncio

T = TypeVar("T")


class _Resolver(trio_asyncio.TrioExecutor):  # type: ignore[misc]
    """Threads for the loop, which looks up names in them, and waits for none that hangs."""

    async def submit(self, func: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(func, *args, abandon_on_cancel=True)


class Bridge:
    """Calls asyncio-flavoured functions from Trio tasks.

    Args:
        context: one in which the loop is the running one. Whoever calls may be a task that was
            made elsewhere.
    """

    def __init__(self, loop: trio_asyncio.TrioEventLoop, context: Context) -> None:
        self._loop = loop
        self._context = context

    async def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await `function(*args)` on the loop.

        Cancelling the Trio scope cancels the asyncio task and waits for it: redis-py then drops
        the connection without waiting for anybody.
        """
        task = self._loop.create_task(function(*args), context=self._context)
        result: T = await trio_asyncio.run_aio_future(task)
        return result


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """Open the loop for as long as the block lasts."""
    async with trio_asyncio.open_loop() as loop:
        loop.set_default_executor(_Resolver())
        yield Bridge(loop, copy_context())
