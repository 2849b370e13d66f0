"""What a server and its services have used, from outside: CPU by process, memory, and what Redis
and PostgreSQL count themselves.
"""

import statistics
import time
import urllib.request
from collections.abc import Mapping
from itertools import islice
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import redis

from bench.machine import kernel_bytes
from bench.subjects import Sottovoce

SECONDS = 10.0  # for any question
SAMPLED_KEYS = 3_000
STATEMENTS = "sottovoce_postgres_statements_total"
ROUND_TRIPS = "sottovoce_redis_round_trips_total"

Counts = dict[str, float]
"""What only grows, and what is; by name."""


def cpu_seconds(pid: int) -> float:
    """Of a process with all of its threads, in nanosecond steps: /proc has hundredths."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


class Meters:
    """Of one running deployment."""

    def __init__(self, server: Sottovoce) -> None:
        self._workers = list(server.pids)
        self._postgres = psutil.Process(server.postgres_pid)
        self._redis_pid = server.redis_pid
        host, port = server.addresses[0]
        self._metrics = f"http://{host}:{port}/metrics"
        self._sql = psycopg.connect(server.database_url, connect_timeout=10, autocommit=True)
        self._redis = redis.Redis.from_url(server.redis_url, socket_timeout=SECONDS)
        self._spent: dict[int, float] = {}
        # What a reading itself adds to the counts of the next: it answers with kilobytes.
        before, after = self._services(), self._services()
        self._own = {name: after[name] - before[name] for name in after}
        self._readings = 0

    def __enter__(self) -> "Meters":
        return self

    def __exit__(self, *_: object) -> None:
        self._sql.close()
        self._redis.close()

    def read(self) -> Counts:
        """Now. Takes some milliseconds, of which the workers have one or two; what it adds to the
        services' counts is left out of them.
        """
        counts = {f"worker {n} cpu": cpu_seconds(pid) for n, pid in enumerate(self._workers)}
        counts["worker cpu"] = sum(counts.values())
        counts["postgres cpu"] = self._postgres_cpu()
        counts["redis cpu"] = cpu_seconds(self._redis_pid)
        counts["seconds"] = time.perf_counter()
        services = self._services()
        self._readings += 1
        for name, own in self._own.items():
            services[name] -= self._readings * own
        return counts | self._own_counts() | services

    def memory(self) -> Counts:
        """Bytes, now."""
        info = self._info("memory")
        return {
            "rss": float(sum(psutil.Process(pid).memory_info().rss for pid in self._workers)),
            "kernel": float(kernel_bytes()),
            "redis memory": float(info["used_memory"]),
        }

    def clean(self) -> None:
        """So that no window has the work of filling the tables in it: rows are marked as seen, and
        what was written is on disk."""
        self._sql.execute("VACUUM ANALYZE chat_messages, chat_channels")
        self._sql.execute("CHECKPOINT")

    def storage(self) -> Counts:
        """What one message, one audit row and one channel take, in bytes: see `plan.Storage`."""
        messages = self._one("SELECT pg_total_relation_size('chat_messages')")
        audit = self._one("SELECT pg_total_relation_size('chat_audit')")
        counts = {
            "characters": self._one("SELECT avg(length(content)) FROM chat_messages"),
            "message_row": messages / max(1.0, self._one("SELECT count(*) FROM chat_messages")),
            "audit_row": audit / max(1.0, self._one("SELECT count(*) FROM chat_audit")),
            "messages": self._one("SELECT count(*) FROM chat_messages"),
        }
        kept, weights = [], []
        for key in islice(self._redis.scan_iter(count=1_000), SAMPLED_KEYS):
            if self._redis.type(key) == b"zset":
                kept.append(int(self._redis.zcard(key)))
                weights.append(int(self._redis.memory_usage(key, samples=0) or 0))
        if len(set(kept)) > 1:
            message, channel = statistics.linear_regression(kept, weights)
            counts |= {"redis_message": message, "redis_channel": max(0.0, channel)}
        return counts

    def _postgres_cpu(self) -> float:
        """All of its processes, those that have ended included, but not this connection's own."""
        own = self._sql.info.backend_pid
        for child in self._postgres.children():
            if child.pid != own:
                try:
                    self._spent[child.pid] = cpu_seconds(child.pid)
                except OSError:  # ended just now; what it had used last is kept
                    continue
        return sum(self._spent.values()) + cpu_seconds(self._postgres.pid)

    def _own_counts(self) -> Counts:
        with urllib.request.urlopen(self._metrics, timeout=SECONDS) as answer:  # noqa: S310
            text = answer.read().decode()
        counts = {"statements": 0.0, "appends": 0.0, "round trips": 0.0}
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(STATEMENTS):
                counts["statements"] += float(value)
                if 'query="append"' in name:
                    counts["appends"] += float(value)
            elif name.startswith(ROUND_TRIPS):
                counts["round trips"] += float(value)
        return counts

    def _services(self) -> Counts:
        return self._redis_counts() | self._postgres_counts()

    def _redis_counts(self) -> Counts:
        stats = self._info("stats")
        commands = self._info("commandstats")
        calls = {name.removeprefix("cmdstat_"): float(c["calls"]) for name, c in commands.items()}
        return {
            "redis commands": float(stats["total_commands_processed"]),
            "redis bytes in": float(stats["total_net_input_bytes"]),
            "redis bytes out": float(stats["total_net_output_bytes"]),
            "redis scripts": calls.get("evalsha", 0.0) + calls.get("eval", 0.0),
            "redis publishes": calls.get("publish", 0.0),
        }

    def _postgres_counts(self) -> Counts:
        return {
            "wal bytes": self._one("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"),
            "wal pages": self._one("SELECT wal_fpi FROM pg_stat_wal"),
            "commits": self._one(
                "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            ),
        }

    def _info(self, section: str) -> Mapping[str, Any]:
        info: Mapping[str, Any] = self._redis.info(section)
        return info

    def _one(self, query: str) -> float:
        row = self._sql.execute(query.encode()).fetchone()
        assert row is not None
        return float(row[0] or 0)
