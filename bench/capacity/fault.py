"""What a fault looks like from outside: deliveries each quarter of a second while Valkey is killed
with SIGKILL and started again, empty.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]

from bench.capacity.crowd import Channels, Crowd, Driver
from bench.capacity.measure import CONNECTIONS
from bench.client import Page, Posts
from bench.machine import CORES, client_on
from bench.statistics import percentile
from bench.subjects import sottovoce

STREAMS = 2_000
SENDS = 400.0
BUCKET_SECONDS = 0.25
BEFORE, GONE, AFTER = 10.0, 10.0, 10.0
"""Seconds."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A run with a fault in it.

    Attributes:
        killed, back: seconds from the beginning.
        delivered: deliveries of each bucket, by the moment at which they arrived.
        p99_ms: of each bucket, by the moment at which their sends were due; 0 where none was.
        expected, received: deliveries in all.
    """

    workers: int
    streams: int
    sends: float
    bucket_seconds: float
    killed: float
    back: float
    delivered: list[int]
    p99_ms: list[float]
    expected: int
    received: int


def run_fault(say: Callable[[str], None], *, workers: int = 2) -> Fault:
    say(f"killing Valkey under {SENDS:,.0f} sends/s and {STREAMS:,} streams")
    with (
        client_on(CORES),
        sottovoce(workers, pairs=STREAMS // 2, pinned=False) as server,
        Crowd(server.addresses, page=Page()) as crowd,
        Posts(server.addresses[0], CONNECTIONS) as posts,
    ):
        crowd.watch(posts.fd, posts.read)
        requests = [server.stream_request(p, side) for p in server.pairs for side in (True, False)]
        crowd.open(requests, page=server.page)
        driver = Driver(
            server, crowd, posts, channels=Channels(server.pairs, 2), sends=SENDS, characters=100
        )
        driver.run(2.0)
        driver.drain()
        crowd.forget()
        driver = Driver(
            server, crowd, posts, channels=Channels(server.pairs, 2), sends=SENDS, characters=100
        )
        began = time.perf_counter()
        driver.run(BEFORE)
        valkey = psutil.Process(server.redis_pid)
        program, folder = valkey.exe(), valkey.cwd()
        killed = time.perf_counter() - began
        valkey.send_signal(signal.SIGKILL)
        driver.run(GONE)
        address = urlsplit(server.redis_url)
        again = subprocess.Popen(
            [program, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            assert again.stdin is not None
            settings = {
                "bind": "127.0.0.1",
                "port": address.port,
                "requirepass": address.password,
                "save": '""',
                "appendonly": "no",
            }
            again.stdin.write("".join(f"{k} {v}\n" for k, v in settings.items()).encode())
            again.stdin.close()
            back = time.perf_counter() - began
            driver.run(AFTER)
            driver.drain()
        finally:
            again.kill()
            again.wait()
        ends = time.perf_counter() - began
        buckets = int(min(ends, BEFORE + GONE + AFTER) / BUCKET_SECONDS)
        delivered = [0] * buckets
        due: list[list[float]] = [[] for _ in range(buckets)]
        for arrived, latency in zip(crowd.arrivals, crowd.latencies, strict=True):
            at = int((arrived - began) / BUCKET_SECONDS)
            sent = int((arrived - latency - began) / BUCKET_SECONDS)
            if 0 <= at < buckets:
                delivered[at] += 1
            if 0 <= sent < buckets:
                due[sent].append(latency)
        return Fault(
            workers=workers,
            streams=STREAMS,
            sends=SENDS,
            bucket_seconds=BUCKET_SECONDS,
            killed=killed,
            back=back,
            delivered=delivered,
            p99_ms=[percentile(sorted(each), 0.99) * 1000 if each else 0.0 for each in due],
            expected=driver.expected,
            received=len(crowd.latencies),
        )
