"""A few connections to PostgreSQL, and what its failures mean.

A statement is never cancelled midway, which would have to wait for a server that may hang: one
that is over its time has its socket shut down, which ends it at once. Nor is a connection given up
with the statement that asked for it: whoever waits takes the first that there is, a new one or one
that another statement has done with, and what came too late for one is there for the next.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import outcome
import psycopg
import structlog
import trio

from storage.breaker import Breaker, Event
from storage.contract import StoreUnavailable
from storage.failures import describe
from storage.metrics import POSTGRES_SECONDS, POSTGRES_STATEMENTS
from storage.postgres.connection import Connection, Row, connect
from storage.postgres.queries import QUERIES
from storage.postgres.unreachable import Unreachable, why_unreachable
from storage.waiting import Waiter

log = structlog.get_logger("storage")

LOCK_TIMEOUT_SECONDS = 1.0
"""For the few statements that wait for a row's lock; appends never wait."""
SLOW_SECONDS = 0.5
"""A statement that takes longer is logged by name, and so is a connection, as `connect`."""
CONNECT_SECONDS = 5.0
"""For a connection to be set up, however short the time of who waits for it. When a primary has
failed over all workers log in at once, and each login takes milliseconds of its CPU."""

_UNAVAILABLE = ("08", "57", "53", "25006", "58")
"""SQLSTATE classes of a server that cannot serve: connection, operator intervention (shutdown,
crash, cancel), resources, read-only (a standby), system error. PostgreSQL docs, Appendix A."""
_BUSY = ("55P03", "40001", "40P01")
"""Lock not available, serialization failure, deadlock."""

_SETTINGS = b"""
SELECT set_config('timezone', 'UTC', false), set_config('lock_timeout', %s, false),
       set_config('statement_timeout', %s, false),
       set_config('idle_in_transaction_session_timeout', %s, false),
       set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),
       set_config('enable_mergejoin', 'off', false), set_config('jit', 'off', false)
"""
"""Not in the startup packet's options, which connection poolers refuse.

Every statement here finds its rows by an index. A plan that was made while a table was small
reads all of it instead, and stays in use while the table grows, until it is analyzed: after
20,000 messages an append took 5.7 ms in place of 1.0. And where the planner is told not to, what
it does all the same looks so dear to it that it would compile the statement (jit): for longer
than any of them takes."""


class StatementFailed(Exception):
    """A statement was refused: a defect of ours, or data that does not fit.

    Attributes:
        sqlstate: PostgreSQL's code. The text is left out: it may repeat values.
    """

    def __init__(self, name: str, sqlstate: str | None) -> None:
        super().__init__(f"statement {name} failed with {sqlstate}")
        self.sqlstate = sqlstate


class Pool:
    """Runs named statements, each in its own transaction.

    Args:
        conninfo: libpq's keywords and values.
        size: connections at most; those aside whose login takes longer than a statement may.
        seconds: for one statement, the wait for a connection included.
        nursery: where connections are set up, until `close`. It must outlive who uses them.
        on_epoch: called with the epoch each time that PostgreSQL has said it: before the first
            statement, and at each `probe`. Plain.
    """

    def __init__(
        self,
        conninfo: Mapping[str, Any],
        *,
        breaker: Breaker,
        size: int,
        seconds: float,
        nursery: trio.Nursery,
        on_epoch: Callable[[int], None],
    ) -> None:
        self._breaker = breaker
        self._seconds = seconds
        self._on_epoch = on_epoch
        self._has_epoch = False
        self._conninfo = {
            **conninfo,
            "application_name": "sottovoce",
            "tcp_user_timeout": round(seconds * 1000),
            "keepalives_idle": 30,
        }
        self._settings = (
            f"{round(LOCK_TIMEOUT_SECONDS * 1000)}",
            f"{round(seconds * 1000)}",
            f"{round(seconds * 5000)}",
        )
        self._idle: list[Connection] = []
        self._waiting: deque[Waiter[Connection]] = deque()
        """Never any while one is idle."""
        self._open = 0
        self._connecting: set[trio.CancelScope] = set()
        self._size = size
        self._free = trio.Semaphore(size)
        self.on_refused: Callable[[], None] = lambda: None
        """Called when PostgreSQL has refused a statement. Synchronous."""
        self._nursery = nursery
        self._closed = False
        self.unreachable: Unreachable | None = None
        """Why the last attempt to connect failed; None once a connection was made."""

    async def fetch(
        self,
        name: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        seconds: float | None = None,
    ) -> list[Row]:
        """Run the statement `name` and commit it.

        A connection that breaks is replaced and the statement asked once more, so every
        statement here must bear being run twice.

        Raises:
            StoreUnavailable: PostgreSQL is down or hangs, no connection was free in time, or a
                lock was not. Whether the statement was committed is then unknown.
            StatementFailed: PostgreSQL refused it.
        """
        self._breaker.check()
        deadline = trio.current_time() + (seconds or self._seconds)
        if not self._has_epoch:
            await self.ask_epoch()
        with POSTGRES_SECONDS.labels(name).time():
            rows = await self._try(name, params, deadline, again=True)
            if rows is None:
                rows = await self._try(name, params, deadline)
        if rows is None:
            raise StoreUnavailable
        self._breaker.record(Event.SUCCEEDED)
        return rows

    async def ask_epoch(self) -> None:
        """Have PostgreSQL say its epoch, unless it has: nothing is asked of it before.

        Raises:
            StoreUnavailable: it does not.
        """
        if not self._has_epoch and not await self.probe():
            raise StoreUnavailable

    @property
    def connections(self) -> int:
        """Idle ones, and those in use."""
        return self._open

    async def probe(self) -> bool:
        """Whether PostgreSQL answers, which it does with its epoch. Never raises."""
        deadline = trio.current_time() + min(1.0, self._seconds)
        try:
            rows = await self._try("ping", (), deadline)
        except (StoreUnavailable, StatementFailed):
            return False
        if rows:  # first: whoever waits for PostgreSQL must not find the old one
            self._has_epoch = True
            self._on_epoch(rows[0][0])
        self._breaker.record(Event.SUCCEEDED if rows else Event.FAILED)
        return bool(rows)

    def close(self) -> None:
        """Plain. What is in use is closed when it is put back."""
        self._closed = True
        self._discard_idle()
        for scope in self._connecting:
            scope.cancel()

    async def _try(
        self,
        name: str,
        params: Sequence[Any] | Mapping[str, Any],
        deadline: float,
        *,
        again: bool = False,
    ) -> list[Row] | None:
        """One try; None if the connection broke.

        Args:
            again: there will be another one, on a new connection. Until then a broken one says
                nothing of the server: an idle one may have been dead for hours, all of them at
                once after a restart.
        """
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            scope = trio.CancelScope(deadline=deadline)
            with scope:
                await self._free.acquire()
            if scope.cancelled_caught:  # everybody else is slow: no news about the server
                raise StoreUnavailable from None
        connection: Connection | None = None
        try:
            connection = await self._take(deadline)
            started = trio.current_time()
            POSTGRES_STATEMENTS.labels(name).inc()
            rows = await connection.fetch(QUERIES[name], params, deadline=deadline)
            if (took := trio.current_time() - started) > SLOW_SECONDS:
                log.warning("postgres_slow", statement=name, seconds=round(took, 3))
            return rows
        except psycopg.Error as error:
            if connection is not None and _broken(error):
                connection.pgconn.finish()  # libpq may not know yet that the server has left
            self._judge(error, name, news=not again or trio.current_time() >= deadline)
            return None
        finally:
            if connection is not None:
                self._put_back(connection)
            self._free.release()

    async def _take(self, deadline: float) -> Connection:
        """An idle connection, or the first that there is.

        Raises:
            StoreUnavailable: there was none in time, or PostgreSQL turned one away.
        """
        if self._idle:
            return self._idle.pop()
        waiter: Waiter[Connection] = Waiter()
        self._waiting.append(waiter)
        self._provide()
        try:
            with trio.CancelScope(deadline=deadline):
                return await waiter.wait()
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        self._failed(Event.FAILED, "connect", trio.TooSlowError())
        raise StoreUnavailable

    def _put_back(self, connection: Connection) -> None:
        if connection.closed:
            self._open -= 1
            self._discard_idle()  # they are as old as this one, or older
            self._provide()
        else:
            self._give(connection)

    def _give(self, connection: Connection) -> None:
        if waiter := self._next_waiter():
            waiter.answer(outcome.Value(connection))
        elif not self._closed and self._open <= self._size:
            self._idle.append(connection)
        else:
            connection.pgconn.finish()
            self._open -= 1

    def _next_waiter(self) -> Waiter[Connection] | None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.task is not None:  # or its time is over, and it has not yet run to leave
                return waiter
        return None

    def _provide(self) -> None:
        """As many on their way as there are who wait, if so many are allowed.

        One that takes longer than a statement does not count: it may have been sent to a server
        that is gone.
        """
        late = trio.current_time() + CONNECT_SECONDS - self._seconds
        coming = sum(scope.deadline > late for scope in self._connecting)
        wanted = min(len(self._waiting), self._size - self._open) - coming
        for _ in range(0 if self._closed else wanted):
            scope = trio.CancelScope(
                deadline=trio.current_time() + CONNECT_SECONDS,
                shield=True,  # who writes what is left at the end may need it: `close` ends it
            )
            self._connecting.add(scope)
            self._nursery.start_soon(self._connect, scope)

    async def _connect(self, scope: trio.CancelScope) -> None:
        """Set a connection up, for whoever has waited longest by then."""
        started = trio.current_time()
        connection: Connection | None = None
        ready = False
        error: Exception = trio.TooSlowError()
        try:
            with scope:
                connection = await connect(self._conninfo)
                soon = trio.current_time() + self._seconds
                await connection.fetch(_SETTINGS, self._settings, deadline=soon)
                ready = True
        except Exception as caught:
            error = caught
        finally:
            self._connecting.remove(scope)
            if connection is not None and not ready:
                connection.pgconn.finish()
        took = trio.current_time() - started
        if connection is not None and ready:
            if took > SLOW_SECONDS:
                log.warning("postgres_slow", statement="connect", seconds=round(took, 3))
            self._open += 1
            self.unreachable = None
            self._give(connection)
        elif took < self._seconds and (waiter := self._next_waiter()):
            self._failed(Event.REFUSED if connection is None else Event.FAILED, "connect", error)
            waiter.answer(outcome.Error(StoreUnavailable()))
        # What took longer says nothing of now: whoever asked for it has left, and said so.
        self._provide()

    def _judge(self, error: psycopg.Error, name: str, *, news: bool) -> None:
        """Returns if the connection broke, and the statement may be asked again.

        Args:
            news: whether a broken connection counts against the server.

        Raises:
            StoreUnavailable: asking again now would not help.
            StatementFailed: the statement is at fault.
        """
        state = error.sqlstate or ""
        if _broken(error):
            if news:
                self._failed(Event.FAILED, name, error)
            else:
                log.info("postgres_connection_replaced", statement=name, **describe(error))
            return
        if state in _BUSY or state == "57014":  # a lock, or its time: no news about the server
            log.warning("postgres_busy", statement=name, sqlstate=state)
            raise StoreUnavailable from None
        if state.startswith(_UNAVAILABLE):
            self._failed(Event.FAILED, name, error)
            raise StoreUnavailable from None
        log.error("statement_failed", statement=name, sqlstate=state)
        self.on_refused()
        raise StatementFailed(name, state) from None

    def _failed(self, event: Event, statement: str, error: Exception) -> None:
        why = why_unreachable(error) if statement == "connect" else None
        # While it is down, that was said once; but not that it is refused for a new reason.
        if self._breaker.up or (why is not None and why != self.unreachable):
            cause = {} if why is None else {"cause": why.cause, "remedy": why.remedy}
            log.warning("postgres_failed", statement=statement, **cause, **describe(error))
        self.unreachable = why or self.unreachable
        self._breaker.record(event)

    def _discard_idle(self) -> None:
        while self._idle:
            connection = self._idle.pop()  # a name, or it would be gone before it is closed
            connection.pgconn.finish()
            self._open -= 1


def _broken(error: psycopg.Error) -> bool:
    """Whether the connection is of no more use: broken off, shut down, killed (57P01 to 57P05)."""
    return error.sqlstate is None or error.sqlstate.startswith("57P")
