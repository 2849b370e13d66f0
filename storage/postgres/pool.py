"""A few connections to PostgreSQL, and what its failures mean.

A statement is never cancelled midway, which would have to wait for a server that may hang: one
that is over its time has its socket shut down, which ends it at once. Nor is a connection given up
with the statement that asked for it: whoever waits takes the first that there is, a new one or one
that another statement has done with, and what came too late for one is there for the next.

Behind a pooler such as PgBouncer, the next statement of a connection may run in another session,
which the next client gets. There nothing is left in a session: each statement brings its settings
along, for its own transaction, and none is prepared. That costs 0.4 ms for each statement, so it
is done only where it must be: `_SESSION` finds out.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import outcome
import psycopg
import structlog
import trio
from psycopg.pq import TransactionStatus

from storage.breaker import Breaker, Event
from storage.contract import StoreUnavailable
from storage.failures import describe
from storage.metrics import POSTGRES_SECONDS, POSTGRES_STATEMENTS
from storage.postgres.connection import Connection, Row, connect
from storage.postgres.errors import Belongs, belongs_to, shows_a_pooler
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

AGE_JITTER = 0.25
"""Connections that were set up together are not replaced together, but over this share of their
age."""
RENEW_AGAIN_SECONDS = 30.0
"""How long an old connection is kept before the next try where its successor was refused: one that
works is not given up for none. Jittered by half."""
REFUSED_SECONDS = 1.0
"""How long no further connection is asked for after one was refused while others serve, as where
a role's limit of connections is reached. Jittered by half."""

_PLANNER = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
_PLANNER["jit"] = "off"
"""Every statement here finds its rows by an index. A plan that was made while a table was small
reads all of it instead, and stays in use while the table grows, until it is analyzed: after
20,000 messages an append took 5.7 ms in place of 1.0. And where the planner is told not to, what
it does all the same looks so dear to it that it would compile the statement (jit): for longer
than any of them takes."""

_SESSION = "SELECT {settings} WHERE pg_backend_pid() = {pid}"
"""Sets the session up and returns a row, unless a pooler is between: that tells its clients made-up
process ids, for no session is theirs alone. The settings are not in the startup packet's options,
which poolers refuse."""


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
        conninfo: libpq's keywords and values; several hosts by comma.
        size: connections at most; those aside whose login takes longer than a statement may, and
            one that is set up in place of an old one.
        age: seconds after which a connection is replaced.
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
        age: float,
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
        milliseconds = {
            "lock_timeout": LOCK_TIMEOUT_SECONDS,
            "statement_timeout": seconds,
        }
        limits = {name: str(round(limit * 1000)) for name, limit in milliseconds.items()}
        self._settings = {"timezone": "UTC", **limits, **_PLANNER}
        self._pooled = False
        """A pooler was found: from then on no connection keeps anything in its session."""
        self._idle: list[Connection] = []
        """Used from its end, so that those which are not needed stay at its beginning."""
        self._current: set[Connection] = set()
        """Those that may serve. One that is not among them is closed when it is put back."""
        self._waiting: deque[Waiter[Connection]] = deque()
        """Never any while one is idle."""
        self._open = 0
        """Current ones, and those that are not any more and still in use."""
        self._connecting: set[trio.CancelScope] = set()
        self._renewing = False
        self._refused_until = 0.0
        """On Trio's clock: until then no more connections are asked for, unless there is none."""
        self._age = age
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
        in_any_epoch: bool = False,
    ) -> list[Row]:
        """Run the statement `name` and commit it.

        Where a new connection may help (see `errors`), the statement is asked once more on one,
        so every statement here must bear being run twice.

        Args:
            in_any_epoch: the statement may be asked where there is no epoch, for it is about what
                the database lacks.

        Raises:
            StoreUnavailable: PostgreSQL is down or hangs, no connection was free in time, or a
                lock was not. Whether the statement was committed is then unknown.
            StatementFailed: PostgreSQL refused it.
        """
        self._breaker.check()
        deadline = trio.current_time() + (seconds or self._seconds)
        if not self._has_epoch and not in_any_epoch:
            await self.ask_epoch()
        with POSTGRES_SECONDS.labels(name).time():
            try:
                rows = await self._try(name, params, deadline, again=True)
            except _AskAgain:
                rows = await self._try(name, params, deadline)
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
        """How many are open: idle ones, and those in use."""
        return self._open

    async def probe(self) -> bool:
        """Whether PostgreSQL answers with its epoch. Never raises.

        It is called every few seconds, so an old connection is replaced from here.
        """
        deadline = trio.current_time() + min(1.0, self._seconds)
        try:
            rows = await self._try("ping", (), deadline)
        except StoreUnavailable:
            return False
        except StatementFailed:
            rows = []
        if rows:  # first: whoever waits for PostgreSQL must not find the old one
            self._has_epoch = True
            self._on_epoch(rows[0][0])
        self._breaker.record(Event.SUCCEEDED)  # also without one: then it lacks something else
        self._renew()
        return bool(rows)

    def close(self) -> None:
        """Plain. What is in use is closed when it is put back."""
        self._closed = True
        self._discard(in_use=True)
        for scope in self._connecting:
            scope.cancel()

    async def _try(
        self,
        name: str,
        params: Sequence[Any] | Mapping[str, Any],
        deadline: float,
        *,
        again: bool = False,
    ) -> list[Row]:
        """One try.

        Args:
            again: there may be another one, on a new connection. Until then a broken one says
                nothing of the server: an idle one may have been dead for hours, all of them at
                once after a restart.

        Raises:
            _AskAgain: there should be another one.
            StoreUnavailable, StatementFailed: see `fetch`.
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
            late = trio.current_time() >= deadline
            belongs = belongs_to(error)
            if connection is not None and belongs in (Belongs.SESSION, Belongs.CONNECTION):
                self._pooled = self._pooled or shows_a_pooler(error)
                self._current.discard(connection)
                # The others are as old, or older. Where this one was ended by its deadline, they
                # may only be less slow.
                self._discard(in_use=not late)
            self._judge(error, belongs, name, again=again and not late)
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
        if not self._current:  # else everybody else is slow: no news about the server
            self._failed(Event.FAILED, "connect", trio.TooSlowError())
        raise StoreUnavailable

    def _put_back(self, connection: Connection) -> None:
        idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
        if connection in self._current and idle:
            self._give(connection)
        else:
            self._close(connection)
            self._provide()

    def _give(self, connection: Connection) -> None:
        if waiter := self._next_waiter():
            waiter.answer(outcome.Value(connection))
        elif not self._closed and len(self._current) <= self._size:
            self._idle.append(connection)
        else:
            self._close(connection)

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
        now = trio.current_time()
        if self._closed or (self._current and now < self._refused_until):
            return
        late = now + CONNECT_SECONDS - self._seconds
        coming = sum(scope.deadline > late for scope in self._connecting)
        wanted = min(len(self._waiting), self._size - self._open) - coming
        for _ in range(wanted):
            scope = trio.CancelScope(
                deadline=now + CONNECT_SECONDS,
                shield=True,  # who writes what is left at the end may need it: `close` ends it
            )
            self._connecting.add(scope)
            self._nursery.start_soon(self._connect, scope)

    async def _connect(self, scope: trio.CancelScope, old: Connection | None = None) -> None:
        """Set a connection up, for whoever has waited longest by then.

        Args:
            old: the one whose place it takes.
        """
        started = trio.current_time()
        connection: Connection | None = None
        ready = False
        error: Exception = trio.TooSlowError()
        try:
            with scope:
                connection = await connect(self._conninfo)
                await self._set_up(connection)
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
            connection.renew_at = trio.current_time() + self._age * (
                1 - random.uniform(0, AGE_JITTER)
            )
            self._open += 1
            self.unreachable = None
            self._current.add(connection)
            if old is not None:
                self._retire(old)
            self._give(connection)
        elif old is not None:
            log.warning("postgres_connection_kept", **_cause(error), **describe(error))
            old.renew_at = trio.current_time() + RENEW_AGAIN_SECONDS * (1 - random.uniform(0, 0.5))
        elif self._current:
            # Others serve, so the server is well: whoever waits gets one of theirs.
            log.warning("postgres_connection_refused", **_cause(error), **describe(error))
            self._refused_until = trio.current_time() + random.uniform(0.5, 1) * REFUSED_SECONDS
        elif took < self._seconds and (waiter := self._next_waiter()):
            self._failed(Event.REFUSED if connection is None else Event.FAILED, "connect", error)
            waiter.answer(outcome.Error(StoreUnavailable()))
        # What took longer says nothing of now: whoever asked for it has left, and said so.
        self._renewing = self._renewing and old is None
        self._provide()

    async def _set_up(self, connection: Connection) -> None:
        """Set up the session, or where it is a pooler's, each statement.

        Raises:
            psycopg.Error
        """
        if not self._pooled:
            settings = _set(self._settings)
            pid = connection.pgconn.backend_pid
            query = _SESSION.format(settings=settings, pid=pid).encode()
            deadline = trio.current_time() + self._seconds
            if await connection.fetch(query, (), deadline=deadline):
                return
            log.info("postgres_pooler_found")
            self._pooled = True
        connection.preamble = f"SELECT {_set(self._settings, local=True)}".encode()
        connection.prepare_threshold = None

    def _renew(self) -> None:
        """Begin to replace a connection that has reached its age; at most one at a time.

        A server that a name does not lead to any more is left that way, and memory that a session
        has gathered is freed. Those that were idle the longest are closed and not replaced.
        """
        now = trio.current_time()
        for connection in [c for c in self._idle[:-1] if c.renew_at <= now]:
            self._retire(connection)
        old = next((c for c in self._current if c.renew_at <= now), None)
        if old is None or self._renewing or self._closed or not self._breaker.up:
            return
        self._renewing = True
        scope = trio.CancelScope(deadline=now + CONNECT_SECONDS, shield=True)
        self._connecting.add(scope)
        self._nursery.start_soon(self._connect, scope, old)

    def _retire(self, connection: Connection) -> None:
        """Close it, as soon as it is not in use."""
        self._current.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._close(connection)

    def _judge(self, error: psycopg.Error, belongs: Belongs, name: str, *, again: bool) -> NoReturn:
        """Say what follows of an error.

        Args:
            again: whether there is a second try left, and time for it.

        Raises:
            _AskAgain: a new connection may help.
            StoreUnavailable: asking again now would not help.
            StatementFailed: the statement is at fault.
        """
        match belongs:
            case Belongs.SESSION | Belongs.CONNECTION if again:
                log.info("postgres_connection_replaced", statement=name, **describe(error))
                raise _AskAgain from None
            case Belongs.CONNECTION | Belongs.SERVER:
                self._failed(Event.FAILED, name, error)
                if name == "ping":  # counts twice: it asks for nothing that could take its time
                    self._breaker.record(Event.FAILED)
                raise StoreUnavailable from None
            case Belongs.CONTENTION:  # no news about the server
                log.warning("postgres_busy", statement=name, sqlstate=error.sqlstate)
                raise StoreUnavailable from None
        if name != "ping":  # which is asked all the time: `requirements_unmet` says it once
            log.error("statement_failed", statement=name, **describe(error))
        self.on_refused()
        raise StatementFailed(name, error.sqlstate) from None

    def _failed(self, event: Event, statement: str, error: Exception) -> None:
        why = why_unreachable(error) if statement == "connect" else None
        # While it is down, that was said once; but not that it is refused for a new reason.
        if self._breaker.up or (why is not None and why != self.unreachable):
            cause = {} if why is None else _cause(error)
            log.warning("postgres_failed", statement=statement, **cause, **describe(error))
        self.unreachable = why or self.unreachable
        self._breaker.record(event)

    def _discard(self, *, in_use: bool) -> None:
        """Close the idle ones, and, if so told, those in use as they are put back."""
        if in_use:
            self._current.clear()
        while self._idle:
            self._close(self._idle.pop())

    def _close(self, connection: Connection) -> None:
        self._current.discard(connection)
        connection.pgconn.finish()
        self._open -= 1


def _cause(error: Exception) -> dict[str, str]:
    """Fields for a log line: why no connection could be made, and what to do about it."""
    why = why_unreachable(error)
    return {} if why is None else {"cause": why.cause, "remedy": why.remedy}


class _AskAgain(Exception):
    """The statement failed for the sake of its connection."""


def _set(settings: Mapping[str, str], *, local: bool = False) -> str:
    """SQL's list of calls that set them, for the session or for the transaction."""
    scope = "true" if local else "false"
    return ", ".join(f"set_config('{name}', '{to}', {scope})" for name, to in settings.items())
