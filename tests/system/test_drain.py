"""The end of a server, and its replacement, with everybody on it."""

import json
import random
import resource
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import trio

from server.cli.people import seed_pairs
from server.engine.worker import END_SECONDS
from tests.support.keep_alive import KeepAlive
from tests.support.running import running_server, wait_until
from tests.support.services import Database
from tests.support.sse import BROKEN, StreamClient, open_stream
from tests.support.wire import WIRE
from tests.system import crowd
from tests.system.audience import Ask, Audience
from tests.system.crowd import Ledger, Pair, Reader, send_one
from tests.system.test_serve import Deployment

CHANNELS = 2500  # of two streams each
TALKING = 250
"""Channels in which something is said; in the others nobody says a word."""
SENDS_PER_SECOND = 500
DRAIN_SECONDS = 5.0
PROBE_SECONDS = 0.25
BIN_SECONDS = 0.5
ABRUPT = WIRE.path != "ours"
"""Hypercorn closes idle connections as soon as a worker retires, without a word on the last answer,
and over HTTP/2 may lose the end of a stream behind its last event. Whoever then uses such a
connection must ask again, as browsers do by themselves."""


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def deployment(folder: Path, database: Database, redis_url: str) -> Deployment:
    return Deployment(folder, database, redis_url)


class Talk:
    """One message at a time in each of some channels, and a beat that waits for nobody."""

    def __init__(self, audience: Audience, channels: Sequence[tuple[int, str]]) -> None:
        self.sends: list[Ask] = []
        self._audience = audience
        self._channels = channels
        self._next_at = time.monotonic()

    def beat(self) -> None:
        """Send what is due, and take what has arrived meanwhile."""
        now = time.monotonic()
        while self._next_at <= now:
            self._next_at += 1 / SENDS_PER_SECOND
            number = len(self.sends)
            channel_id, token = self._channels[number % len(self._channels)]
            body = json.dumps({"channelId": channel_id, "content": f"message {number}"}).encode()
            asked = request("POST", "/api/chat/send", token, body)
            self.sends.append(self._audience.ask(asked, (channel_id, number)))
        self._audience.turn(max(0.0, self._next_at - time.monotonic()))

    def go_on(self, *, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.beat()

    @property
    def acknowledged(self) -> list[tuple[int, int, int]]:
        """(channel, sequence number, number of the message), in the order of sending."""
        return [
            (send.about[0], json.loads(send.body)["message"]["seq"], send.about[1])
            for send in self.sends
            if send.status == 200
        ]


def request(
    method: str, path: str, token: str = "", body: bytes = b"", *, last_id: int = 0
) -> bytes:
    fields = [f"{method} {path} HTTP/1.1", "host: localhost"]
    if token:
        fields.append(f"authorization: Bearer {token}")
    if body:
        fields += ["content-type: application/json", f"content-length: {len(body)}"]
    if last_id:
        fields.append(f"last-event-id: {last_id}")
    return "\r\n".join([*fields, "", ""]).encode() + body


def stream_request(channel_id: int, token: str, *, last_id: int = 0) -> bytes:
    return request("GET", f"/api/chat/{channel_id}", token, last_id=last_id)


def port_of(client: httpx.Client) -> int:
    assert client.base_url.port is not None
    return client.base_url.port


def outcome(ask: Ask) -> str:
    return str(ask.status) if ask.status else "refused" if ask.refused else "no answer"


def histogram(moments: Sequence[float]) -> list[int]:
    """How many there are in each half of a second from zero on."""
    counts = Counter(int(moment / BIN_SECONDS) for moment in moments)
    return [counts[index] for index in range(max(counts) + 1)]


def stored(database: Database) -> list[tuple[int, int, int]]:
    """As `Talk.acknowledged`, in the order of channels and their numbers."""
    rows = database.execute(
        "SELECT channel_id, seq, content FROM chat_messages ORDER BY channel_id, seq"
    )
    return [(channel_id, seq, int(content.split()[1])) for channel_id, seq, content in rows]


def by_channel(messages: Sequence[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Channel → (sequence number, number of the message), in their order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for channel_id, seq, number in messages:
        found.setdefault(channel_id, []).append((seq, number))
    return found


@pytest.mark.once
@pytest.mark.usefixtures("many_files")
def test_sigterm_under_load_loses_nothing_and_spreads_who_comes_back(
    deployment: Deployment, database: Database, capsys: pytest.CaptureFixture[str]
):
    expires = int(time.time()) + 3600
    people = [
        (pair.channel_id, deployment.signer.mint(sub=person, exp=expires))
        for pair in seed_pairs(database.url, CHANNELS)
        for person in (pair.therapist, pair.prospect)
    ]
    deployment.write(SOTTOVOCE_DRAIN_SECONDS=str(DRAIN_SECONDS))
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        with Audience(port_of(client)) as audience:
            listeners = audience.listen([stream_request(*person) for person in people])
            talk = Talk(audience, people[: 2 * TALKING : 2])
            talk.go_on(seconds=2)
            probes: list[tuple[Ask, Ask]] = []
            process.terminate()
            told = time.monotonic()
            while process.poll() is None:
                talk.beat()
                if time.monotonic() > told + PROBE_SECONDS * (len(probes) + 1):
                    stream = audience.ask(stream_request(*people[-1]), fresh=True)
                    readyz = audience.ask(request("GET", "/readyz"), fresh=True)
                    probes.append((stream, readyz))
                assert time.monotonic() < told + DRAIN_SECONDS + END_SECONDS
            ended = time.monotonic()
            audience.until(
                lambda: not audience.answers_due + audience.streams_open, seconds=1, what="the end"
            )

    went = [(listener.told_at or 0) - told for listener in listeners]
    retries = [listener.closing[1] for listener in listeners if listener.closing]
    back = [moment + retry / 1000 for moment, retry in zip(went, retries, strict=False)]
    with capsys.disabled():
        print(f"\nSIGTERM to the end: {ended - told:.2f} s")
        print("streams told to go, per half second:", *histogram(went))
        print("coming back, per half second:", *histogram(back))
        print(f"retry: {min(retries)} to {max(retries)} ms")
        print("sends:", dict(Counter(map(outcome, talk.sends))))

    # Every stream was told, and when to come back; evenly, and not all of them at once.
    assert {listener.closing and listener.closing[0] for listener in listeners} == {"drain"}
    assert all(listener.whole for listener in listeners)
    assert max(histogram(went)) < 2 * len(went) * BIN_SECONDS / DRAIN_SECONDS
    assert DRAIN_SECONDS - 1 < max(went) < DRAIN_SECONDS + 1
    assert max(histogram(back)) < 2 * len(back) * BIN_SECONDS / DRAIN_SECONDS
    assert max(retries) - min(retries) > 1000 and len(set(retries)) > 500

    # New streams were turned away, and no traffic asked for, until nobody accepted any more.
    gone = told + DRAIN_SECONDS
    asked = [ask for pair in probes for ask in pair if ask.ended_at and ask.ended_at < gone]
    assert len(asked) > DRAIN_SECONDS / PROBE_SECONDS
    assert {ask.status for ask in asked} == {503}
    assert all(ask.header(b"retry-after") for ask, _ in probes if ask.status)
    assert all(json.loads(ask.body)["draining"] for _, ask in probes if ask.status)

    # Sends went on as before. In the end a connection may be closed before it says something.
    for send in talk.sends:
        assert send.status == 200 or (not send.status and (send.ended_at or 0) > gone), outcome(
            send
        )
    assert sum(not send.status and not send.refused for send in talk.sends) < SENDS_PER_SECOND / 2

    # What was acknowledged is there, once and in order; and nothing else: no answer, no message.
    kept = stored(database)
    assert sorted(talk.acknowledged) == kept
    assert len(kept) > SENDS_PER_SECOND * (2 + DRAIN_SECONDS) * 0.9
    for channel_id, sent in by_channel(talk.acknowledged).items():
        assert [seq for seq, _ in sent] == list(range(1, len(sent) + 1)), channel_id

    # Who comes back, by the last id that it was shown, is shown the rest.
    shown = [listener.seqs for listener in listeners[: 2 * TALKING]]
    with deployment.serving() as (_, client), Audience(port_of(client)) as audience:
        lasts = [max(seqs, default=0) for seqs in shown]
        again = audience.listen(
            [
                stream_request(*person, last_id=last)
                for person, last in zip(people, lasts, strict=False)
            ]
        )
        for (channel_id, _), seqs, listener in zip(people, shown, again, strict=False):
            seqs += listener.seqs
            assert seqs == [seq for seq, _ in by_channel(kept)[channel_id]]


def test_a_second_sigterm_ends_it_at_once(deployment: Deployment):
    deployment.write(SOTTOVOCE_DRAIN_SECONDS="30")
    channel = f"/api/chat/{deployment.people['prospect'].channel_id}"
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        family = psutil.Process(process.pid).children()
        with client.stream("GET", channel), client.stream("GET", channel):
            process.terminate()
            wait_until(lambda: deployment.log.count('"draining"') == 2)
            process.terminate()
            process.wait(3)
        assert psutil.wait_procs(family, timeout=1)[1] == []


async def talk_until(
    done: trio.Event, base_url: str, pair: Pair, token: str, ledger: Ledger
) -> None:
    client = KeepAlive(base_url, token)
    try:
        while not done.is_set():
            body = {
                "channelId": pair.channel_id,
                "content": "said while they are replaced",
                "clientMessageId": str(uuid.uuid4()),
            }
            await send_one(client, body, ledger)
            await trio.sleep(random.uniform(0, 0.2))
    finally:
        await client.aclose()


class Guest(Reader):
    """A reader to whom a stream may end in one way: it is told to come back."""

    told: str | None = None

    async def run(self, base_url: str) -> None:
        while True:
            self.told, opened = None, False
            try:
                async with open_stream(
                    base_url, self.pair.channel_id, self._token, last_id=self._last_id
                ) as client:
                    opened = True
                    self.connections += 1
                    await self._listen(client)
            except BROKEN:
                if not ABRUPT:
                    raise
            assert not opened or self.told == '{"reason":"drain","reconnect":true}'
            await trio.sleep(self._rng.uniform(0, 0.05))

    async def _listen(self, client: StreamClient) -> None:
        while (batch := await client.read()) is not None:
            for event in batch:
                assert self.told is None, "something followed the closing"
                if event.event == "closing":
                    self.told = event.data
                elif event.event == "message":
                    self._show(event)
                else:
                    assert event.event == "heartbeat"


async def test_workers_replaced_twice_in_mid_conversation_show_nobody_an_error():
    ledger, rolled = Ledger(), trio.Event()
    with running_server(workers=2, SOTTOVOCE_DRAIN_SECONDS="1") as server:
        pairs = crowd.seed_pairs(20, server.data_dir)
        readers = [
            Guest(pair, token, [], random.Random(0))
            for pair in pairs
            for token in (pair.therapist_token, pair.prospect_token)
        ]
        seen = {*server.ready.pids.workers}
        async with trio.open_nursery() as streams:
            for reader in readers:
                streams.start_soon(reader.run, server.base_url)
            for reader in readers:
                await reader.open.wait()
            async with trio.open_nursery() as senders:
                for pair in pairs:
                    for token in (pair.therapist_token, pair.prospect_token):
                        senders.start_soon(talk_until, rolled, server.base_url, pair, token, ledger)
                for roll in (1, 2):
                    server.process.send_signal(signal.SIGUSR1)
                    with trio.fail_after(60):
                        while server.log.count("rolled") < roll:
                            await trio.sleep(0.1)
                    now = {*server.reload_ready().pids.workers}
                    assert len(now) == 2 and not now & seen
                    seen |= now
                rolled.set()
            with trio.move_on_after(10):
                while ledger.check(readers):
                    await trio.sleep(0.05)
            streams.cancel_scope.cancel()
    assert ledger.check(readers) == []
    assert ledger.retries == 0 or ABRUPT
    assert sum(map(len, ledger.acknowledged.values())) > 500
    assert all(reader.connections > 1 for reader in readers)


def test_workers_go_on_where_their_successors_would_not_come_up(deployment: Deployment):
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        before = workers_of(process)
        deployment.write(SOTTOVOCE_HEARTBEAT_SECONDS="often")
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "roll_stopped" in deployment.log, what="giving up")
        assert "SOTTOVOCE_HEARTBEAT_SECONDS" in deployment.log
        assert workers_of(process) == before
        for _ in range(8):  # on whichever worker
            with httpx.Client(**WIRE.client) as another:
                assert another.get(f"{client.base_url}/readyz").status_code == 200
        deployment.write(SOTTOVOCE_HEARTBEAT_SECONDS="15")
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: '"rolled"' in deployment.log, seconds=30, what="rolling")
        assert not workers_of(process) & before
        assert client.get("/readyz").status_code == 200


def test_workers_go_on_where_their_successors_could_let_nobody_in(deployment: Deployment):
    key = deployment.values["CLERK_JWT_KEY"]
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        before = workers_of(process)
        # 127.0.0.1$, where no issuer is
        nowhere = {"NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_MTI3LjAuMC4xJA=="}
        somewhere = {name: deployment.values[name] for name in nowhere}
        deployment.write(CLERK_JWT_KEY="", **nowhere)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "roll_stopped" in deployment.log, seconds=30, what="giving up")
        assert "successor_not_ready" in deployment.log
        assert workers_of(process) == before
        for _ in range(8):  # on whichever worker
            with httpx.Client(**WIRE.client) as another:
                assert another.get(f"{client.base_url}/readyz").status_code == 200
        deployment.write(CLERK_JWT_KEY=key, **somewhere)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: '"rolled"' in deployment.log, seconds=30, what="rolling")
        assert not workers_of(process) & before
        assert client.get("/readyz").status_code == 200


def test_sigterm_in_the_middle_of_a_roll_tells_all_streams_and_leaves_no_process(
    deployment: Deployment,
):
    deployment.write(SOTTOVOCE_DRAIN_SECONDS="1")
    channel = f"/api/chat/{deployment.people['prospect'].channel_id}"
    with ExitStack() as stack:
        process, client = stack.enter_context(deployment.serving("--workers", "2"))
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        family = psutil.Process(process.pid).children()
        streams = [
            stack.enter_context(client.stream("GET", channel)).iter_lines() for _ in range(10)
        ]
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "worker_draining" in deployment.log, what="retiring")
        family += psutil.Process(process.pid).children()
        assert len(set(family)) >= 3
        process.terminate()
        for lines in streams:
            assert any('"drain"' in line for line in lines)
        assert process.wait(END_SECONDS) == 0
        assert psutil.wait_procs(set(family), timeout=1)[1] == []


def workers_of(process: "subprocess.Popen[bytes]") -> set[int]:
    return {worker.pid for worker in psutil.Process(process.pid).children()}
