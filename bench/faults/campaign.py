"""One campaign: the load runs, faults come and go, and then the ledger is checked."""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]
import trio

from bench.faults.deployment import Deployment, open_deployment
from bench.faults.faults import FAULTS, Place
from bench.faults.ledger import Attempt, Ledger, Violation, check
from bench.faults.people import Load
from bench.statistics import percentile

WARM_SECONDS = 4.0
FAULT_SECONDS = 90.0
"""One that is not over then is a defect of the campaign."""
BETWEEN_SECONDS = (2.0, 3.5)
"""In which what a fault did shows, before the next one comes."""
READY_SECONDS = 15.0
MIXED_FROM = 0.6
"""Of the campaign's time: from then on a second fault comes while the first lasts."""
DEFECTS = {
    "request_failed",
    "stream_failed",
    "task_failed",
    "thread_failed",
    "process_failed",
    "exception_ignored",
    "delivery_failed",
    "batch_failed",
    "statement_failed",
    "connection_failed",
    "application_failed",
    "drain_failed",
    "log_lines_dropped",
    "audit_rows_lost",
}
NOTICED_SECONDS = 1.0
"""After a fault that lasts no time, in which connections are still broken by it."""
MANY_ATTEMPTS = 20_000
"""Among which one that is acknowledged is looked for."""
END_SECONDS = 100.0
"""For the last senders to be answered, and for everybody to see everything."""


class Window(NamedTuple):
    """One fault: when it came and when it was mended, in seconds since the beginning.

    Attributes:
        alone: no other was there meanwhile: only then its times say something of it.
        ready: when all servers said that they have everything again; None: not within
            `READY_SECONDS`, or not looked at.
    """

    kind: str
    began: float
    healed: float
    alone: bool
    ready: float | None


class Usage(NamedTuple):
    """Of all servers' processes."""

    descriptors: int
    megabytes: float


class Outcome(NamedTuple):
    seed: int
    ledger: Ledger
    violations: list[Violation]
    windows: list[Window]
    times: dict[str, list["Times"]]
    before: Usage
    after: Usage
    silences: int
    complaints: Counter[str]
    """Lines of the servers' logs that are warnings or worse, by event."""

    @property
    def faults(self) -> Counter[str]:
        return Counter(window.kind for window in self.windows)

    @property
    def defects(self) -> list[str]:
        """Events that no fault of another part explains: something of ours is wrong."""
        return sorted(DEFECTS & self.complaints.keys())


class Times(NamedTuple):
    """What clients felt of one fault, in seconds; None where nothing was measured.

    Attributes:
        same, other: p99 from a send's first attempt to a delivery on a stream that was live then,
            over the server that took it and over the other.
        answer: the slowest answer to an attempt.
        sends_back: from the mending to the first acknowledgment of an attempt made after it.
        streams_back: the longest that a page was without a live stream.
        ready_back: from the mending until all servers say that they have everything.
    """

    same: float | None
    other: float | None
    answer: float | None
    sends_back: float | None
    streams_back: float | None
    ready_back: float | None


async def run_campaign(
    folder: Path,
    *,
    seed: int,
    seconds: float,
    channels: int,
    rate: float,
    kinds: Sequence[str] = tuple(FAULTS),
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Break things for so long.

    Args:
        folder: an empty one, for everything that is written.
        seed: of everything that chance decides here; the machine's own chance is not ours.
        rate: sends a second.
        kinds: of faults; each comes as often as the others.
        say: is told what happens.
    """
    rng = random.Random(seed)
    ledger = Ledger()
    async with open_deployment(folder, channels=channels) as deployment:
        load = Load(deployment, ledger, seed=seed, rate=rate)
        place = Place(deployment, load, rng)
        async with trio.open_nursery() as pages, trio.open_nursery() as talkers:
            load.run(pages, talkers)
            await trio.sleep(WARM_SECONDS)
            before = usage(deployment)
            windows = await _break(place, kinds, seconds, say)
            say("all is mended: the last sends, and what is still to be seen")
            load.talking = False
            await _settle(talkers, load, deployment)
            for page in load.pages:
                page.reader.caught_up = True
            after = usage(deployment)
            pages.cancel_scope.cancel()
            talkers.cancel_scope.cancel()
        violations = check(ledger, await deployment.stored())
    complaints = await trio.to_thread.run_sync(_complaints, [node.log for node in deployment.nodes])
    attempts = sorted(
        (attempt for send in ledger.sends for attempt in send.attempts), key=lambda each: each.at
    )
    times: dict[str, list[Times]] = {kind: [] for kind in kinds}
    for window in windows:
        if window.alone:
            times[window.kind].append(_times(window, load, attempts))
    return Outcome(
        seed, ledger, violations, windows, times, before, after, load.silences, complaints
    )


async def _break(
    place: Place, kinds: Sequence[str], seconds: float, say: Callable[[str], None]
) -> list[Window]:
    windows: list[Window] = []
    deck: list[str] = []
    load, rng = place.load, place.rng
    began = load.now

    def draw() -> str:
        if not deck:
            deck.extend(kinds)
            rng.shuffle(deck)
        return deck.pop()

    async def one(kind: str, *, alone: bool) -> None:
        started = load.now
        say(f"{started:7.1f} s  {kind}{'' if alone else ' (mixed)'}")
        with trio.fail_after(FAULT_SECONDS):
            await FAULTS[kind](place)
        healed, ready = load.now, None
        if alone:
            with trio.move_on_after(READY_SECONDS):
                for node in place.deployment.nodes:
                    await node.ready()
                ready = load.now
        windows.append(Window(kind, started, healed, alone, ready))

    while load.now - began < seconds:
        if load.now - began < MIXED_FROM * seconds:
            await one(draw(), alone=True)
        else:
            async with trio.open_nursery() as nursery:
                first = draw()
                nursery.start_soon(lambda kind: one(kind, alone=False), first)
                await trio.sleep(rng.uniform(0.0, 1.5))
                second = draw()
                if _may_meet(first, second):
                    nursery.start_soon(lambda kind: one(kind, alone=False), second)
        await trio.sleep(rng.uniform(*BETWEEN_SECONDS))
    return windows


def _may_meet(first: str, second: str) -> bool:
    """Two hands on the same part would undo each other's work, and show nothing of ours."""
    parts = ("valkey", "postgres", "server", "issuer")
    return not any(part in first and part in second for part in parts) and not (
        _stops_a_server(first) and _stops_a_server(second)
    )


def _stops_a_server(kind: str) -> bool:
    return kind.startswith(("supervisor", "server", "disk", "worker", "issuer", "event", "file"))


async def _settle(talkers: trio.Nursery, load: Load, deployment: Deployment) -> None:
    """Until everybody was answered and has seen everything, or it takes too long."""
    with trio.move_on_after(END_SECONDS):
        while talkers.child_tasks:
            await trio.sleep(0.1)
        heads = {number: len(rows) for number, rows in (await deployment.stored()).items()}
        while not all(
            page.live and (page.last or 0) == heads[page.reader.channel_id] for page in load.pages
        ):
            await trio.sleep(0.1)


def usage(deployment: Deployment) -> Usage:
    descriptors, memory = 0, 0.0
    for node in deployment.nodes:
        for worker in node.workers():
            with suppress(psutil.NoSuchProcess):
                descriptors += worker.num_fds()
                memory += worker.memory_info().rss / 1e6
    return Usage(descriptors, memory)


def _times(window: Window, load: Load, attempts: list[Attempt]) -> Times:
    until = window.healed + 1.0
    first = bisect_left(load.delivered, window.began, key=lambda each: each.at)
    last = bisect_left(load.delivered, until, key=lambda each: each.at)
    felt = load.delivered[first:last]
    first = bisect_left(attempts, window.began, key=lambda each: each.at)
    last = bisect_left(attempts, until, key=lambda each: each.at)
    healed = bisect_left(attempts, window.healed, key=lambda each: each.at)
    back = [
        each.at + each.took - window.healed
        for each in attempts[healed : healed + MANY_ATTEMPTS]
        if each.status == 200
    ]
    return Times(
        same=_p99([each.took for each in felt if each.live and each.same]),
        other=_p99([each.took for each in felt if each.live and not each.same]),
        answer=max((each.took for each in attempts[first:last]), default=None),
        sends_back=min(back, default=None),
        streams_back=max(_gaps(window, load), default=None),
        ready_back=READY_SECONDS if window.ready is None else window.ready - window.healed,
    )


def _gaps(window: Window, load: Load) -> list[float]:
    """How long pages that lost their stream in the window were without one."""
    gaps = []
    for page in load.pages:
        lost = None
        for session in page.reader.sessions:
            if lost is not None and session.live:
                gaps.append(session.live - lost)
                lost = None
            if lost is None and window.began <= session.ended <= window.healed + NOTICED_SECONDS:
                lost = session.ended
    return gaps


def _complaints(logs: Sequence[Path]) -> Counter[str]:
    found: Counter[str] = Counter()
    for log in logs:
        for line in log.read_bytes().splitlines():
            with suppress(msgspec.DecodeError):  # what is said before the log is set up
                entry = msgspec.json.decode(line, type=_LogLine)
                if entry.level in ("warning", "error", "critical"):
                    found[entry.event] += 1
    return found


class _LogLine(msgspec.Struct):
    level: str
    event: str


def _p99(values: list[float]) -> float | None:
    return percentile(sorted(values), 0.99) if values else None
