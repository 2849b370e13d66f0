"""`connect`: new streams per second, and a storm of them.

A peer's stream is complete with its head: no credential, no history. Sottovoce's brings a
token that the server has not seen before, passes the access check, and is complete with the
20 newest messages of its channel. Where these come from is the case: `cold`, the server has just
started and reads PostgreSQL; `new streams`, the other person of each channel comes after that, and
the server remembers; `from Redis`, the same when it has forgotten.
"""

import time
from collections.abc import Iterator, Sequence

import psycopg

from bench.client import Meter, Page, Streams
from bench.results import Sample
from bench.scenarios import Plan
from bench.statistics import interleave, percentile
from bench.subjects import SUBJECTS, Pair, Server, Sottovoce

NAME = "connect"
STREAMS = 2_500
STORM = 10_000
QUICK_STREAMS = 500
QUICK_STORM = 2_000
HISTORY = 20
FORGOTTEN_SECONDS = 32.0
"""The server keeps what it remembers of a channel for half a minute after its last stream."""
SETTLE_SECONDS = 5.0
"""For the server to be done with the streams that were closed: they are not what is measured."""
QUIET_SLICE = 0.25
QUIET_SHARE = 0.1
"""Of a core."""
STORM_SUBJECTS = ("sottovoce", "engine", "nchan", "uvicorn", "sse-starlette", "better-sse")
SUBJECT_NAMES = (*STORM_SUBJECTS, "hypercorn")

# As the server itself stores them, numbered and counted.
_HISTORY = """
INSERT INTO chat_messages (channel_id, seq, message_id, sender_id, author_email, author_name,
    content, message_type, status, created_at)
SELECT channel.id, seq, gen_random_uuid(), prospect_user_id, 'somebody@example.com', 'Some Body',
    '~ a message of the length that people write to each other, number ' || seq,
    'STANDARD', 'SENT', now() - make_interval(secs => (%(history)s - seq) * 60)
FROM chat_channels AS channel, generate_series(1, %(history)s) AS seq
WHERE last_seq = 0
"""
_HEADS = """
UPDATE chat_channels SET last_seq = %(history)s, last_message_at = now() WHERE last_seq = 0
"""


def run(plan: Plan) -> Iterator[Sample]:
    count, storm = (QUICK_STREAMS, QUICK_STORM) if plan.quick else (STREAMS, STORM)
    for number, name in interleave(plan.of(*SUBJECT_NAMES), plan.rounds):
        plan.say(f"connect: {SUBJECTS[name].label}, round {number + 1}")
        measured = measure(name, number, count, storm, forgotten=not plan.quick)
        yield from plan.guard(f"connect {name}", measured)


def measure(name: str, number: int, count: int, storm: int, *, forgotten: bool) -> Iterator[Sample]:
    """
    Args:
        forgotten: whether to wait until the server has forgotten half of the channels.
    """
    with SUBJECTS[name].start(1) as server:
        if isinstance(server, Sottovoce):
            pairs = server.seed(count)
            others = server.seed(count) if forgotten else []
            crowd = server.seed(storm // 2)
            write_history(server.database_url, HISTORY)
            cold = [server.stream_request(pair, True) for pair in pairs]
            warm = [server.stream_request(pair, False) for pair in pairs]
            everybody = _requests(server, crowd)
            page = Page(b'"connected"', HISTORY)
            if forgotten:
                _open(server, [server.stream_request(pair, True) for pair in others], page)
                time.sleep(FORGOTTEN_SECONDS)
                late = [server.stream_request(pair, False) for pair in others]
                yield _sample(name, "from Redis", number, _open(server, late, page))
            yield _sample(name, "cold", number, _open(server, cold, page))
        else:
            warm, everybody = server.stream_requests(count), server.stream_requests(storm)
            page = server.page
        yield _sample(name, "new streams", number, _open(server, warm, page))
        if name in STORM_SUBJECTS:
            taken = _open(server, everybody, page, in_flight=len(everybody))
            yield _sample(name, f"storm of {storm}", number, taken)


def write_history(database_url: str, messages: int) -> None:
    """Give every channel that has none that many messages."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        connection.execute(_HISTORY, {"history": messages})
        connection.execute(_HEADS, {"history": messages})
    with psycopg.connect(database_url, connect_timeout=10, autocommit=True) as connection:
        connection.execute("ANALYZE chat_messages, chat_channels")
        connection.execute("CHECKPOINT")


def _requests(server: Sottovoce, pairs: Sequence[Pair]) -> list[bytes]:
    return [server.stream_request(pair, side) for pair in pairs for side in (True, False)]


def _open(
    server: Server, requests: list[bytes], page: Page, *, in_flight: int = 64
) -> dict[str, float]:
    with Streams(server.addresses) as streams:
        cpu = server.cpu_seconds
        meter = Meter()
        took = streams.open(requests, page=page, in_flight=in_flight)
        seconds, client_busy = meter.seconds, meter.busy
        cpu = server.cpu_seconds - cpu
        took.sort()
        values = {
            "cpu_us_per_stream": cpu / len(took) * 1e6,
            "streams_per_second": len(took) / seconds,
            "seconds": seconds,
            "p50_ms": percentile(took, 0.5) * 1000,
            "p99_ms": percentile(took, 0.99) * 1000,
            "turned_away": streams.turned_away / len(took),
            "server_busy": cpu / seconds,
            "client_busy": client_busy,
        }
    _settle(server)
    return values


def _settle(server: Server) -> None:
    """Until the server has nothing to do, or its time for that is over."""
    deadline = time.monotonic() + SETTLE_SECONDS
    spent, before = server.cpu_seconds, -1.0
    while spent - before > QUIET_SHARE * QUIET_SLICE and time.monotonic() < deadline:
        time.sleep(QUIET_SLICE)
        spent, before = server.cpu_seconds, spent


def _sample(name: str, case: str, number: int, values: dict[str, float]) -> Sample:
    return Sample(scenario=NAME, subject=name, case=case, round=number, values=values)
