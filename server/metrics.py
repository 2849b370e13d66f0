"""What the server counts: no label names a user, a channel or a text."""

import platform

from prometheus_client import Counter, Gauge, Histogram

import storage.metrics  # noqa: F401 - it settles how values are kept, before the first is made
from server.version import VERSION

BUILD_INFO = Gauge(
    "sottovoce_build_info",
    "1 for each version that runs here; in a rolling restart two",
    ["version", "python"],
    multiprocess_mode="livemax",  # not a sum: a deployment of four workers has one version
)
BUILD_INFO.labels(VERSION, platform.python_version()).set(1)
READY = Gauge(
    "sottovoce_ready",
    "1 while a request could succeed, the least of all workers, looked at each second",
    multiprocess_mode="livemin",
)
CONNECTIONS_OPEN = Gauge(
    "sottovoce_connections_open", "Connections now open", multiprocess_mode="livesum"
)
REFUSED_REQUESTS = Counter(
    "sottovoce_requests_refused", "Requests refused by the HTTP engine, by problem", ["code"]
)
STREAMS_OPEN = Gauge("sottovoce_streams_open", "Streams now open", multiprocess_mode="livesum")
STREAM_SECONDS = Histogram(
    "sottovoce_stream_seconds",
    "How long a stream lived",
    ["reason"],
    buckets=(1, 10, 60, 300, 900, 3600, 4 * 3600),
)
SENDS = Counter("sottovoce_sends", "Messages sent, by what came of it", ["outcome"])
TASKS = Gauge(
    "sottovoce_tasks", "Trio tasks that live, looked at each second", multiprocess_mode="livesum"
)
DELIVERIES = Counter("sottovoce_deliveries", "Messages handed to streams")
DUPLICATES = Counter("sottovoce_duplicates_dropped", "Messages heard of again and dropped")
GAPS = Counter("sottovoce_gaps_filled", "Times that a channel's missing messages were read")
SLOW_STREAMS = Counter("sottovoce_slow_streams_ended", "Streams ended because the reader stalled")
DELIVERY_SECONDS = Histogram(
    "sottovoce_delivery_seconds",
    "From the message's time stamp to its streams' outboxes",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
REQUEST_SECONDS = Histogram(
    "sottovoce_request_seconds",
    "Time to answer a request, streams aside",
    ["route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
