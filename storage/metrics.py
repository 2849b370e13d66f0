"""What the storage layer counts. Labels name statements and dependencies, never people."""

from prometheus_client import Counter, Gauge, Histogram

from storage.metric_files import share_values

NOT_SHARED = share_values()
"""Why other workers cannot show these; None as it should be. Said in the log once there is one."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

POSTGRES_SECONDS = Histogram(
    "sottovoce_postgres_seconds",
    "Time of one PostgreSQL statement",
    ["statement"],
    buckets=_SECONDS,
)
REDIS_SECONDS = Histogram(
    "sottovoce_redis_seconds", "Time of one Redis round trip", ["operation"], buckets=_SECONDS
)
POSTGRES_CONNECTIONS = Gauge(
    "sottovoce_postgres_connections",
    "Connections to PostgreSQL that are open or being opened, looked at each second",
    multiprocess_mode="livesum",
)
POSTGRES_STATEMENTS = Counter(
    "sottovoce_postgres_statements",
    "Statements sent to PostgreSQL: each one round trip, however many callers it serves",
    ["query"],
)
REDIS_ROUND_TRIPS = Counter(
    "sottovoce_redis_round_trips",
    "Pipelines and commands sent to Redis, however many callers each serves",
    ["kind"],
)
DEPENDENCY_UP = Gauge(
    "sottovoce_dependency_up",
    "1 while a dependency answers, the least of all workers",
    ["dependency"],
    multiprocess_mode="livemin",
)
DEPENDENCY_SINCE = Gauge(
    "sottovoce_dependency_since_seconds",
    "When a dependency last went up or down, the newest of all workers, as a Unix time",
    ["dependency"],
    multiprocess_mode="livemax",
)
HISTORY_READS = Counter(
    "sottovoce_history_reads", "Pages of messages read, by where they came from", ["source"]
)
REDIS_WRITES_DROPPED = Counter(
    "sottovoce_redis_writes_dropped", "Messages not put into Redis: it was down or behind"
)
EVICTIONS = Counter(
    "sottovoce_evictions", "Evictions heard on Redis: taken, or ignored as malformed", ["outcome"]
)
AUDIT_ROWS_LOST = Counter(
    "sottovoce_audit_rows_lost", "Audit rows that could not be written within their time"
)
