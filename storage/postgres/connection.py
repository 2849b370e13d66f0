"""psycopg on Trio: its asynchronous connection, which waits for the socket on Trio's terms.

psycopg keeps the conversation with the server apart from the waiting: its generators say for what
they wait, and are told when it is there. So no asyncio loop is needed, and no hop between two
loops for each wait, which cost most of the 0.5 ms of CPU that a statement took.
"""

import ipaddress
import os
import select
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import psycopg
import psycopg.conninfo
import trio
from psycopg.waiting import Ready, Wait

T = TypeVar("T")
Row = tuple[Any, ...]

STAGGER_SECONDS = 0.25
"""How long an address is waited for before the next one is tried beside it: longer than a login
across an ocean takes, and short of the time that a request has. RFC 8305, section 5."""


class Connection(psycopg.AsyncConnection[Row]):
    """One connection, in autocommit. One task at a time.

    Attributes:
        deadline: of the statement under way, on Trio's clock. Then the socket is shut down, which
            no server can hold up.
        preamble: a statement to run before each other one, in its transaction and its round trip.
        renew_at: when the pool replaces the connection for its age, on Trio's clock.
    """

    deadline = float("inf")
    preamble: bytes | None = None
    renew_at = float("inf")

    async def fetch(
        self, query: bytes, params: Sequence[Any] | Mapping[str, Any], *, deadline: float
    ) -> list[Row]:
        """Run one statement. It is not cancelled midway: its deadline ends it.

        Raises:
            psycopg.Error: at its deadline as for a connection that broke.
        """
        self.deadline = deadline
        if self.preamble is None:
            cursor = await self.execute(query, params)
        else:  # what goes to the server before one Sync is one transaction
            async with self.pipeline():
                await self.execute(self.preamble)
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
    """A new connection to the first host that offers one. May be cancelled.

    The caller limits the time of all addresses together. One that hangs takes none of it from
    the others: an address that has not answered after `STAGGER_SECONDS` goes on while the next one
    is tried. libpq checks each for what `target_session_attrs` asks.

    Args:
        conninfo: libpq's keywords and values; `host` and `port` may be lists, by comma.

    Raises:
        psycopg.Error: no address offered one; the error of the one that failed last.
    """
    hosts, ports = str(conninfo["host"]).split(","), str(conninfo["port"]).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    return await _first(
        partial(_connect_to_host, {**conninfo, "host": host.strip(), "port": port.strip()})
        for host, port in zip(hosts, ports, strict=True)
    )


async def _connect_to_host(conninfo: Mapping[str, Any]) -> Connection:
    """The name is looked up here each time: libpq would block the thread."""
    addresses = await _addresses(conninfo["host"], conninfo["port"])
    return await _first(partial(_connect, {**conninfo, "hostaddr": at}) for at in addresses)


async def _first(attempts: Iterable[Callable[[], Awaitable[Connection]]]) -> Connection:
    """The first connection that an attempt makes, in their order of preference.

    The next attempt begins when one has failed or takes longer than `STAGGER_SECONDS`; when one
    succeeds the others are cancelled.

    Raises:
        psycopg.Error: every attempt failed; the last error.
    """
    begin, *others = attempts
    if not others:
        return await begin()
    made: list[Connection] = []
    errors: list[psycopg.Error] = []
    waiting = deque([begin, *others])

    async def attempt() -> None:
        failed = trio.Event()
        begin = waiting.popleft()
        if waiting:
            nursery.start_soon(attempt_next, failed)
        try:
            made.append(await begin())
        except psycopg.Error as error:
            errors.append(error)
            failed.set()
        else:
            nursery.cancel_scope.cancel()

    async def attempt_next(failed: trio.Event) -> None:
        with trio.move_on_after(STAGGER_SECONDS):
            await failed.wait()
        await attempt()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt)
    except BaseException:
        for connection in made:
            connection.pgconn.finish()
        raise
    if not made:
        raise errors[-1]
    for connection in made[1:]:  # ready in the same moment
        connection.pgconn.finish()
    return made[0]


async def _addresses(host: str, port: int | str) -> list[str | None]:
    """A host's addresses; [None] where there is no name to look up.

    Raises:
        psycopg.OperationalError: the name is unknown.
    """
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
        connection._autocommit = True
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
