"""A main application that goes on working while `sottovoce migrate` runs, and what it feels of it.

It is driven at a fixed rate over several connections, so that one statement that waits keeps no
other from being sent; each statement is timed, and PostgreSQL's own list of locks is read every ten
milliseconds besides.
"""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from bench.statistics import percentile
from bench.subjects import ROOT
from bench.takeover.application import Channel, Member, OldApplication

TABLES = ROOT / "tests" / "support" / "layouts"
"""The folder of the layouts, which the tests migrate as well."""

CONNECTIONS = 8
"""The application's pool: how many statements may wait before its rate drops."""
SAMPLE_SECONDS = 0.01
"""How often the locks are sampled: twenty times within what a lock may take."""
MIGRATE_SECONDS = 600.0
"""How long `sottovoce migrate` may take before it is given up."""
PAGE = 50
"""Messages that a page of the application shows."""

# Whatever keeps a reader or a writer of the table from going on.
_STRONG = (
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
)

_LOCKS = """
SELECT l.pid, l.granted, l.mode, l.relation::regclass::text, a.xact_start::text, left(a.query, 90),
       coalesce(extract(epoch FROM clock_timestamp() - l.waitstart), 0)::float8
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE a.datname = current_database()
  AND (NOT l.granted OR l.locktype = 'relation' AND l.mode = ANY (%s) AND l.relation IN (
       'chat_channels'::regclass, 'chat_messages'::regclass))
"""


_BLOCKED = """
SELECT FROM pg_locks l
WHERE NOT l.granted AND l.locktype = 'relation' AND %s = ANY (pg_blocking_pids(l.pid))
LIMIT 1
"""


class Felt(NamedTuple):
    """What the application felt meanwhile. Times in seconds."""

    case: str
    seconds: float
    """How long `sottovoce migrate` took, or the application was watched without it."""
    statements: int
    failures: int
    """Operations of the application that PostgreSQL refused."""
    rate: float
    """Statements a second."""
    p50: float
    p99: float
    longest_statement: float
    longest_wait: float
    """The longest that one of the application's connections was seen to wait for a lock."""
    longest_hold: float
    """The longest that a lock was seen on either table which readers or writers wait for."""
    held: str
    """The name of the longest lock, and the statement that held it."""
    status: int
    """The exit status of `sottovoce migrate`; 0 where it did not run."""
    said: list[str]
    """What it printed."""


class Rows(NamedTuple):
    """How large the application's tables are."""

    messages: int
    channels: int


def fill(conninfo: Mapping[str, Any], layout: str, rows: Rows) -> None:
    """Make the application's tables, and fill them: each channel has a prospect of its own."""
    with psycopg.connect(**conninfo, autocommit=True) as connection:
        connection.execute((TABLES / f"{layout}.sql").read_text("utf-8").encode())
        connection.execute("TRUNCATE chat_messages, chat_channels, users, therapists CASCADE")
        connection.execute((_PEOPLE + _FILL[layout]).format(**rows._asdict()).encode())
        connection.execute("VACUUM ANALYZE")


_PEOPLE = """
INSERT INTO users (id, clerk_id, email, first_name, last_name, is_active, subscription_status)
    SELECT n, 'user_' || n, 'person' || n || '@example.com', 'Person', n::text, true, 'active'
    FROM generate_series(1, {channels} + 1) AS n;
"""
_FILL = {
    "guide": """
INSERT INTO therapists (id, user_id) VALUES (1, {channels} + 1);
INSERT INTO chat_channels (id, channel_identifier, therapist_id, prospect_user_id)
    SELECT n, 'channel-' || n, 1, n FROM generate_series(1, {channels}) AS n;
INSERT INTO chat_messages (channel_id, author_email, author_name, content, created_at)
    SELECT channel, 'person' || channel || '@example.com', 'Person ' || channel,
        repeat('some words of a message ', 1 + n % 8) || n,
        timestamp '2024-01-01' + n * interval '20 seconds'
    FROM generate_series(1, {messages}) AS n, LATERAL (SELECT 1 + n % {channels}) AS one (channel);
-- The guide names none, but without it each page would read the whole table.
CREATE INDEX ON chat_messages (channel_id, created_at);
""",
    "application": """
INSERT INTO therapists (id, user_id, name) VALUES (1, {channels} + 1, 'Therapist');
INSERT INTO chat_channels
    (id, chime_channel_arn, therapist_id, prospect_user_id, status, created_at, updated_at)
    SELECT n, 'arn:' || n, 1, n, 'active', now(), now() FROM generate_series(1, {channels}) AS n;
INSERT INTO chat_messages
    (channel_id, chime_message_id, sender_id, content, sent_at, created_at)
    SELECT channel, 'chime-' || n, channel, repeat('some words of a message ', 1 + n % 8) || n,
        at, at
    FROM generate_series(1, {messages}) AS n,
        LATERAL (SELECT 1 + n % {channels}, timestamp '2024-01-01' + n * interval '20 seconds')
            AS one (channel, at);
""",
}


class Load:
    """The application at work: inserts, reads and updates, at a fixed rate, until it is stopped.

    Args:
        rate: statements a second, in all.
    """

    def __init__(
        self, conninfo: Mapping[str, Any], layout: str, rows: Rows, *, rate: float
    ) -> None:
        self._applications = [OldApplication(conninfo, layout) for _ in range(CONNECTIONS)]
        self._rows = rows
        # A message is two statements, anything else is one: 3 in 2 operations.
        self._every = 1.5 * CONNECTIONS / rate
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, args=(number,)) for number in range(CONNECTIONS)
        ]
        self.failures: list[psycopg.Error] = []

    @property
    def pids(self) -> list[int]:
        """PostgreSQL's processes of its connections."""
        return [application.backend_pid for application in self._applications]

    @property
    def seconds(self) -> list[float]:
        """How long each statement took."""
        return [took for application in self._applications for took in application.seconds]

    def start(self) -> None:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for application in self._applications:
            application.close()

    def _work(self, number: int) -> None:
        application, rng = self._applications[number], random.Random(number)
        therapist = Member(
            self._rows.channels + 1, f"person{self._rows.channels + 1}@example.com", "Therapist"
        )
        due = self._began + self._every * number / CONNECTIONS
        for turn in itertools.count():
            # A statement that waited delays those behind it on its connection, and no other.
            due = max(due + self._every, time.monotonic() - self._every)
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            id_ = rng.randint(1, self._rows.channels)
            prospect = Member(id_, f"person{id_}@example.com", f"Person {id_}")
            try:
                match turn % 4:
                    case 0 | 2:
                        text = f"while it runs {turn}"
                        application.send(
                            Channel(id_, therapist, prospect), text, by_therapist=False
                        )
                    case 1:
                        application.read(id_, PAGE)
                    case _:
                        application.touch(id_)
            except psycopg.Error as failure:
                self.failures.append(failure)


class Sampler:
    """Looks at the locks again and again, in a thread of its own.

    Attributes:
        longest_wait, longest_hold, held: see `Felt`.
    """

    def __init__(self, conninfo: Mapping[str, Any], pids: Sequence[int]) -> None:
        self.longest_wait = 0.0
        self.longest_hold = 0.0
        self.held = ""
        self._connection = psycopg.connect(**conninfo, autocommit=True)
        self._pids = frozenset(pids)
        self._held: dict[tuple[Any, ...], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            held = {}
            for pid, granted, mode, relation, since, query, waited in self._connection.execute(
                _LOCKS, (list(_STRONG),)
            ):
                if not granted:
                    if pid in self._pids:
                        self.longest_wait = max(self.longest_wait, waited)
                    continue
                key = (pid, mode, relation, since)
                held[key] = self._held.get(key, now)
                took = now - held[key] + SAMPLE_SECONDS
                if took > self.longest_hold:
                    self.longest_hold, self.held = took, f"{mode} on {relation}: {query}"
            self._held = held


@contextmanager
def backup(conninfo: Mapping[str, Any], seconds: float) -> Iterator[None]:
    """A transaction as `pg_dump` has one: it reads both tables by one snapshot, and ends `seconds`
    after somebody first waited for it to end."""
    left = threading.Event()

    def end(reader: psycopg.Connection[Any], watcher: psycopg.Connection[Any]) -> None:
        while not left.wait(SAMPLE_SECONDS):
            if watcher.execute(_BLOCKED, (reader.info.backend_pid,)).fetchone() is not None:
                left.wait(seconds)
                break
        reader.execute("COMMIT")

    with (
        psycopg.connect(**conninfo, application_name="backup", autocommit=True) as reader,
        psycopg.connect(**conninfo, autocommit=True) as watcher,
    ):
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("LOCK TABLE chat_channels, chat_messages IN ACCESS SHARE MODE")
        reader.execute("SELECT FROM chat_messages LIMIT 1")
        thread = threading.Thread(target=end, args=(reader, watcher))
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()


def measure(
    case: str,
    conninfo: Mapping[str, Any],
    layout: str,
    rows: Rows,
    *,
    rate: float,
    run: Callable[[], tuple[int, list[str]]],
) -> Felt:
    """What the application feels while `run` runs, which returns (exit status, lines)."""
    load = Load(conninfo, layout, rows, rate=rate)
    sampler = Sampler(conninfo, load.pids)
    began = time.monotonic()
    load.start()
    sampler.start()
    try:
        status, said = run()
        seconds = time.monotonic() - began
    finally:
        load.stop()
        sampler.stop()
    took = sorted(load.seconds)
    return Felt(
        case=case,
        seconds=seconds,
        statements=len(took),
        failures=len(load.failures),
        rate=len(took) / seconds,
        p50=percentile(took, 0.5),
        p99=percentile(took, 0.99),
        longest_statement=took[-1],
        longest_wait=sampler.longest_wait,
        longest_hold=sampler.longest_hold,
        held=sampler.held,
        status=status,
        said=said,
    )


def run_migrate(conninfo: Mapping[str, Any], source: Path | None) -> tuple[int, list[str]]:
    """`sottovoce migrate` as a process of its own: (exit status, what it printed).

    Args:
        source: another tree of ours, whose `migrate` is to run.
    """
    environ = {
        **os.environ,
        "DB_HOST": str(conninfo["host"]),
        "DB_PORT": str(conninfo["port"]),
        "DB_USER": str(conninfo["user"]),
        "DB_PASSWORD": str(conninfo["password"]),
        "DB_DATABASE": str(conninfo["dbname"]),
        "SOTTOVOCE_DB_SSLMODE": "disable",
    }
    if source is not None:
        environ["PYTHONPATH"] = str(source)
    done = subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", "migrate"],
        env=environ,
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=MIGRATE_SECONDS,
    )
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]
