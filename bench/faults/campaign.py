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
from bench.faults.ledger import SEEN_SECONDS, Attempt, Ledger, Violation, check, waits
from bench.faults.people import Load
from bench.statistics import percentile

OPEN_SECONDS = 4.0
"""For all pages to be open, and for the servers to count."""
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
SENT_BEFORE_SECONDS = 0.5
"""What was first sent so long before a fault has been delayed by the one before it, for which it
was repeated until now."""
TICK_SECONDS = 0.02
LATE_SECONDS = 0.05
"""By which the campaign's own loop may be late without a word."""
MANY_ATTEMPTS = 20_000
"""Among which one that is acknowledged is looked for."""
END_SECONDS = 100.0
"""For the last senders to be answered."""
LAST_USAGE_SECONDS = 12.0
"""For visitors to leave, and for memory to come back."""
LAST_LOOK_SECONDS = 5.0
"""For those who were reconnecting just then, to see everything."""
VALKEY = ("valkey", "one server")
POSTGRES = ("postgres", "the way to postgres", "a channel's row")
OURS = (
    *("supervisor", "server", "disk", "worker", "issuer", "event", "file", "one server"),
    "postgres is restored",  # without the servers, which are stopped for it
)
"""Beginnings of the faults' names, by what they break. Only what breaks something else may come
at the same time."""
VISITS = 10
"""After each fault: channels that somebody opens anew."""


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
    """Of all servers' processes, while all pages are open and nobody sends."""

    descriptors: float
    tasks: float
    connections: float
    """To PostgreSQL."""
    megabytes: float

    def leaks(self, before: "Usage") -> list[str]:
        """What has grown by more than `MORE`."""
        return [
            f"{name} {was:.0f} -> {now:.0f}, at most {most:.0f} more"
            for name, was, now, most in zip(self._fields, before, self, MORE, strict=True)
            if not now - was <= most  # NaN is no answer
        ]


MORE = Usage(descriptors=24, tasks=30, connections=14, megabytes=120)
"""At the end than at the beginning, of two servers together. Their pools may be full then, of 8
connections each, and had two or three; a worker that has served holds what its channels said last
and its code's memory, which the operating system does not get back."""


class Outcome(NamedTuple):
    seed: int
    ledger: Ledger
    violations: list[Violation]
    waited: list[float]
    """Seconds from an acknowledgment to a stream that was there, faults aside; the least first."""
    windows: list[Window]
    times: dict[str, list["Times"]]
    before: Usage
    after: Usage
    silences: int
    complaints: Counter[str]
    """Lines of the servers' logs that are warnings or worse, by event."""
    busy: float
    """Percent of the machine's CPU, on average: near 100 the times say more of it than of us."""

    @property
    def faults(self) -> Counter[str]:
        return Counter(window.kind for window in self.windows)

    @property
    def leaks(self) -> list[str]:
        """What the servers did not give back."""
        return self.after.leaks(self.before)

    @property
    def defects(self) -> list[str]:
        """Events that no fault of another part explains: something of ours is wrong."""
        return sorted(DEFECTS & self.complaints.keys())


class Times(NamedTuple):
    """What clients felt of one fault, in seconds; None where nothing was measured.

    Attributes:
        began: when it came, since the beginning.
        same, other: p99 from a send's first attempt to a delivery on a stream that was live then,
            over the server that took it and over the other.
        answer: the slowest answer to an attempt.
        sends_back: from the mending to the first acknowledgment of an attempt made after it.
        streams_back: the longest that a page was without a live stream.
        ready_back: from the mending until all servers say that they have everything.
        late: the longest that the campaign itself was held up, which is part of the others.
    """

    began: float
    same: float | None
    other: float | None
    answer: float | None
    sends_back: float | None
    streams_back: float | None
    ready_back: float | None
    late: float = 0.0


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
    lags: list[tuple[float, float]] = []
    async with open_deployment(folder, channels=channels) as deployment:
        load = Load(deployment, ledger, seed=seed, rate=rate)
        place = Place(deployment, load, rng)
        async with trio.open_nursery() as pages, trio.open_nursery() as talkers:
            load.open(pages)
            pages.start_soon(_watch, load, lags)
            await trio.sleep(OPEN_SECONDS)
            before = await usage(deployment)
            load.talk(talkers)
            await trio.sleep(WARM_SECONDS)
            psutil.cpu_percent()
            windows = await _break(place, kinds, seconds, say)
            busy = psutil.cpu_percent()
            say("all is mended: the last sends, and what is still to be seen")
            load.stop()
            await _settle(talkers, load, deployment)
            for page in load.pages:
                page.reader.caught_up = True
            ledger.troubles = [(window.began, window.healed) for window in windows]
            ledger.ended = load.now
            after = await _usage_again(deployment, before)
            pages.cancel_scope.cancel()
            talkers.cancel_scope.cancel()
        stored = await deployment.stored()
    violations = check(ledger, stored)
    waited = sorted(wait.seconds for wait in waits(ledger, stored) if wait.shown)
    complaints = await trio.to_thread.run_sync(_complaints, [node.log for node in deployment.nodes])
    attempts = sorted(
        (attempt for send in ledger.sends for attempt in send.attempts), key=lambda each: each.at
    )
    times: dict[str, list[Times]] = {kind: [] for kind in kinds}
    for window in windows:
        if window.alone:
            times[window.kind].append(_times(window, load, attempts, lags))
    return Outcome(
        seed=seed,
        ledger=ledger,
        violations=violations,
        waited=waited,
        windows=windows,
        times=times,
        before=before,
        after=after,
        silences=load.silences,
        complaints=complaints,
        busy=busy,
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
        load.visit(VISITS)
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
    return not any(
        first.startswith(part) and second.startswith(part) for part in (VALKEY, POSTGRES, OURS)
    )


async def _settle(talkers: trio.Nursery, load: Load, deployment: Deployment) -> None:
    """Until everybody was answered and has seen everything, or it takes too long.

    Nobody says anything more, and the streams of the quiet channels stay: what they have missed
    has its full time, and nothing helps them to find it.
    """
    with trio.move_on_after(END_SECONDS):
        while talkers.child_tasks:
            await trio.sleep(0.1)
    await trio.sleep(SEEN_SECONDS + 1.0)
    with trio.move_on_after(LAST_LOOK_SECONDS):
        heads = {number: len(rows) for number, rows in (await deployment.stored()).items()}
        while not all(
            page.live and (page.last.seq if page.last else 0) == heads[page.reader.channel_id]
            for page in load.pages
        ):
            await trio.sleep(0.1)


async def usage(deployment: Deployment) -> Usage:
    descriptors, memory, tasks, connections = 0, 0.0, 0.0, 0.0
    for node in deployment.nodes:
        tasks += await node.gauge("sottovoce_tasks")
        connections += await node.gauge("sottovoce_postgres_connections")
        for worker in node.workers():
            with suppress(psutil.NoSuchProcess):
                descriptors += worker.num_fds()
                memory += worker.memory_info().rss / 1e6
    return Usage(descriptors, tasks, connections, memory)


async def _usage_again(deployment: Deployment, before: Usage) -> Usage:
    """Once it is what it was, or has had its time to be."""
    with trio.move_on_after(LAST_USAGE_SECONDS):
        while (found := await usage(deployment)).leaks(before):
            await trio.sleep(0.5)
        return found
    return await usage(deployment)


def _times(
    window: Window, load: Load, attempts: list[Attempt], lags: list[tuple[float, float]]
) -> Times:
    until = window.healed + 1.0
    first = bisect_left(load.delivered, window.began, key=lambda each: each.at)
    last = bisect_left(load.delivered, until, key=lambda each: each.at)
    felt = [
        each
        for each in load.delivered[first:last]
        if each.at - each.took > window.began - SENT_BEFORE_SECONDS
    ]
    first = bisect_left(attempts, window.began, key=lambda each: each.at)
    last = bisect_left(attempts, until, key=lambda each: each.at)
    healed = bisect_left(attempts, window.healed, key=lambda each: each.at)
    back = [
        each.at + each.took - window.healed
        for each in attempts[healed : healed + MANY_ATTEMPTS]
        if each.status == 200
    ]
    return Times(
        window.began,
        same=_p99([each.took for each in felt if each.live and each.same]),
        other=_p99([each.took for each in felt if each.live and not each.same]),
        answer=max((each.took for each in attempts[first:last]), default=None),
        sends_back=min(back, default=None),
        streams_back=max(_gaps(window, load), default=None),
        ready_back=READY_SECONDS if window.ready is None else window.ready - window.healed,
        late=max((late for at, late in lags if window.began <= at <= until), default=0.0),
    )


async def _watch(load: Load, lags: list[tuple[float, float]]) -> None:
    """Note when this loop was late, and by how much: (at, seconds)."""
    while True:
        due = trio.current_time() + TICK_SECONDS
        await trio.sleep_until(due)
        if (late := trio.current_time() - due) > LATE_SECONDS:
            lags.append((load.now, late))


def _gaps(window: Window, load: Load) -> list[float]:
    """How long pages that lost their stream in the window were without one."""
    gaps = []
    for page in load.pages:
        if page.node is not None:  # it waits for its own server
            continue
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
