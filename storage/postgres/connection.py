"""psycopg on Trio: its asynchronous connection, which waits for the socket on Trio's terms.

psycopg keeps the conversation with the server apart from the waiting: its generators say for what
they wait, and are told when it is there. So no asyncio loop is needed, and no hop between two
loops for each wait, which cost most of the 0.5 ms of CPU that a statement took.
"""

import ipaddress
import os
import select
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
import psycopg.conninfo
import trio
from psycopg.waiting import Ready, Wait

T = TypeVar("T")
Row = tuple[Any, ...]


class Connection(psycopg.AsyncConnection[Row]):
    """One connection, in autocommit. One task at a time.

    Attributes:
        deadline: of the statement under way, on Trio's clock. Then the socket is shut down, which
            no server can hold up.
    """

    deadline = float("inf")

    async def fetch(
        self, query: bytes, params: Sequence[Any] | Mapping[str, Any], *, deadline: float
    ) -> list[Row]:
        """Run one statement. It is not cancelled midway: its deadline ends it.

        Raises:
            psycopg.Error: at its deadline as for a connection that broke.
        """
        self.deadline = deadline
        cursor = await self.execute(query, params)
        return await cursor.fetchall()

    async def wait(self, gen: Generator[Wait, Ready, T], *_: object, **__: object) -> T:
        """psycopg's: run a part of the conversation to its end."""
        fileno = self.pgconn.socket
        try:
            wanted = next(gen)
            while True:
                ready = None
                with trio.CancelScope(deadline=self.deadline, shield=True):
                    ready = await _ready(fileno, wanted)
                if ready is None:
                    self._sever()
                    self.deadline = float("inf")
                else:
                    wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result

    def _sever(self) -> None:
        """Shut the socket down under libpq, which then reports a broken connection."""
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)


async def connect(conninfo: Mapping[str, Any]) -> Connection:
    """A new connection. The caller limits the time; may be cancelled.

    Args:
        conninfo: libpq's keywords and values.

    Raises:
        psycopg.Error
    """
    error: psycopg.Error | None = None
    for address in await _addresses(conninfo["host"], conninfo["port"]):
        try:
            connection = await _connect({**conninfo, "hostaddr": address})
        except psycopg.Error as failed:
            error = failed
        else:
            connection._autocommit = True
            return connection
    raise error or psycopg.OperationalError


async def _addresses(host: str, port: int | str) -> list[str | None]:
    """Of a name: libpq would block the thread to look it up. None where there is nothing to."""
    if host.startswith("/"):
        return [None]
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return [None]
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise psycopg.OperationalError from error  # `why_unreachable` tells it by its cause
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def _connect(conninfo: Mapping[str, Any]) -> Connection:
    gen = Connection._connect_gen(psycopg.conninfo.make_conninfo("", **conninfo))
    try:
        fileno, wanted = next(gen)
        while True:
            fileno, wanted = gen.send(await _ready(fileno, wanted))
    except StopIteration as end:
        connection: Connection = end.value
        return connection


async def _ready(fileno: int, wanted: Wait) -> Ready:
    """Wait until the socket is ready for some of what is wanted."""
    if wanted == Wait.R:
        await trio.lowlevel.wait_readable(fileno)
        return Ready.R
    poll = select.poll()  # a socket that is to be written to nearly always can be
    poll.register(fileno, select.POLLOUT | (select.POLLIN if wanted & Wait.R else 0))
    if not poll.poll(0):
        async with trio.open_nursery() as nursery:

            async def wait(which: Any) -> None:
                await which(fileno)
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, trio.lowlevel.wait_writable)
            if wanted & Wait.R:
                nursery.start_soon(wait, trio.lowlevel.wait_readable)
    events = poll.poll(0)
    ready = events[0][1] if events else 0
    writable = ready & (select.POLLOUT | select.POLLERR | select.POLLHUP)
    readable = wanted & Wait.R and ready & (select.POLLIN | select.POLLERR | select.POLLHUP)
    return Ready((Ready.W if writable else 0) | (Ready.R if readable else 0))
