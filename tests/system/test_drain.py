"""The end of a server, and its replacement, with everybody on it."""

import json
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from server.cli.people import seed_pairs
from server.engine.worker import END_SECONDS
from tests.support.running import wait_until
from tests.support.services import Database
from tests.system.audience import Ask, Audience
from tests.system.test_serve import Deployment

CHANNELS = 2500  # of two streams each
TALKING = 250
"""Channels in which something is said; in the others nobody says a word."""
SENDS_PER_SECOND = 500
DRAIN_SECONDS = 5.0
PROBE_SECONDS = 0.25
BIN_SECONDS = 0.5


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
    asked = [ask for pair in probes for ask in pair if ask.began < told + DRAIN_SECONDS]
    assert len(asked) > DRAIN_SECONDS / PROBE_SECONDS
    assert {ask.status for ask in asked} == {503}
    assert all(ask.header(b"retry-after") for ask, _ in probes if ask.status)
    assert all(json.loads(ask.body)["draining"] for _, ask in probes if ask.status)

    # Sends went on as before. In the end a connection may be closed before it says something.
    for send in talk.sends:
        late = send.began > told + DRAIN_SECONDS
        assert send.status == 200 or (send.status == 0 and late), outcome(send)
    assert sum(not send.status and not send.refused for send in talk.sends) < SENDS_PER_SECOND / 10

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
