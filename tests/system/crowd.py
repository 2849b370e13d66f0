"""A crowd that talks, drops out, comes back, and keeps a ledger of what it was shown.

    python -m tests.system.crowd --ready-file .sottovoce/ready.json --channels 500 --sends 50000

Each channel has a stream for each of its two people and messages from both. Every stream is
cut a number of times, at random moments, by FIN or RST, and resumes by its last event id. In
the end each stream must have been shown every acknowledged message of its channel, once, in
order, with the id and number that the sender was told, and nothing else.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol.parser import ServerSentEvent
from tests.support.keep_alive import KeepAlive
from tests.support.sse import BROKEN, StreamClient, StreamRefused, open_stream

Json = dict[str, Any]


class Pair(msgspec.Struct):
    """A line of `sottovoce seed`."""

    channel_id: int
    therapist_token: str
    prospect_token: str


class Reader:
    """One person's stream, over any number of connections."""

    def __init__(self, pair: Pair, token: str, cuts: Sequence[int], rng: random.Random) -> None:
        self.pair = pair
        self.shown: list[tuple[int, str]] = []
        """(sequence number, message id), in the order shown."""
        self.arrived: dict[str, float] = {}
        self.connections = 0
        self.resets = 0
        self._token = token
        self._cuts = sorted(cuts, reverse=True)
        self._rng = rng
        self._last_id = ""
        self.open = trio.Event()

    async def run(self, base_url: str) -> None:
        while True:
            try:
                async with open_stream(
                    base_url, self.pair.channel_id, self._token, last_id=self._last_id
                ) as client:
                    self.connections += 1
                    await self._read(client)
            except BROKEN:
                pass
            except StreamRefused as refused:
                if refused.status not in (429, 503):
                    raise
            await trio.sleep(self._rng.uniform(0, 0.05))

    async def _read(self, client: StreamClient) -> None:
        while (batch := await client.read()) is not None:
            for event in batch:
                if event.event == "message":
                    self._show(event)
                elif event.event == "reset":
                    self.resets += 1
                if self._cuts and len(self.shown) >= self._cuts[-1]:
                    # What came with it is lost to us, as to a page that was closed.
                    self._cuts.pop()
                    client.cut(reset=self._rng.random() < 0.5)
                    return

    def _show(self, event: ServerSentEvent) -> None:
        data = json.loads(event.data)
        if data.get("type") == "connected":
            self.open.set()
            return
        assert data["channelId"] == self.pair.channel_id, "another channel's message"
        self.shown.append((int(event.id), data["id"]))
        self.arrived.setdefault(data["id"], time.perf_counter())
        self._last_id = event.id

    @property
    def cuts_left(self) -> int:
        return len(self._cuts)


class Ledger:
    """What the senders were told."""

    def __init__(self) -> None:
        self.acknowledged: dict[int, dict[int, str]] = {}
        """Channel → sequence number → message id."""
        self.sent_at: dict[str, float] = {}
        self.retries = 0
        self.violations: list[str] = []

    def note(self, channel_id: int, seq: int, message_id: str) -> None:
        channel = self.acknowledged.setdefault(channel_id, {})
        if channel.setdefault(seq, message_id) != message_id:
            self.violations.append(f"channel {channel_id}: number {seq} was given twice")

    def check(self, readers: Sequence[Reader]) -> list[str]:
        """What is wrong, a line each."""
        wrong = list(self.violations)
        for channel_id, acked in self.acknowledged.items():
            if len(set(acked.values())) != len(acked):
                wrong.append(f"channel {channel_id}: a message was stored twice")
        for index, reader in enumerate(readers):
            acked = self.acknowledged.get(reader.pair.channel_id, {})
            where = f"stream {index} of channel {reader.pair.channel_id}"
            seqs = [seq for seq, _ in reader.shown]
            if seqs != sorted(seqs):
                wrong.append(f"{where}: out of order")
            if len(set(seqs)) != len(seqs):
                wrong.append(f"{where}: a message was shown twice")
            shown = dict(reader.shown)
            if missing := [seq for seq in acked if seq not in shown]:
                wrong.append(f"{where}: {len(missing)} acknowledged messages not shown")
            if any(shown.get(seq, message_id) != message_id for seq, message_id in acked.items()):
                wrong.append(f"{where}: a number came with another message")
            if extra := [seq for seq in shown if seq not in acked]:
                wrong.append(f"{where}: {len(extra)} messages that nobody sent")
            if reader.resets:
                wrong.append(f"{where}: {reader.resets} resets")
            if reader.cuts_left:
                wrong.append(f"{where}: {reader.cuts_left} cuts were never made")
        return wrong


async def send_all(
    base_url: str, pair: Pair, token: str, count: int, ledger: Ledger, name: str
) -> None:
    """One person's messages, each until it is acknowledged, under one client message id."""
    client = KeepAlive(base_url, token)
    try:
        for number in range(count):
            body = {
                "channelId": pair.channel_id,
                "content": f"{name} {number}",
                "clientMessageId": str(uuid.uuid4()),
            }
            await send_one(client, body, ledger)
    finally:
        await client.aclose()


async def send_one(client: KeepAlive, body: Json, ledger: Ledger) -> None:
    deadline = trio.current_time() + 60
    started = time.perf_counter()
    while True:
        try:
            status, raw = await client.post("/api/chat/send", body)
        except BROKEN:
            status, raw = 0, b""  # unknown
        if status == 200:
            message = json.loads(raw)["message"]
            ledger.note(body["channelId"], message["seq"], message["messageId"])
            ledger.sent_at[message["messageId"]] = started
            return
        assert status in (0, 429, 500, 502, 503), f"a send was refused with {status}"
        assert trio.current_time() < deadline, "a send was not acknowledged in a minute"
        ledger.retries += 1
        await trio.sleep(random.uniform(0.05, 0.3))


async def run_crowd(
    base_url: str, pairs: Sequence[Pair], *, sends: int, cuts: int, seed: int, settle: float = 30
) -> Json:
    """Let the crowd talk, then check its ledger.

    Args:
        pairs: channels without messages.
        sends: messages in all.
        cuts: of each stream.
        settle: seconds for the last messages to arrive.

    Returns:
        Figures; `violations` is empty if all is well.
    """
    rng = random.Random(seed)
    each = math.ceil(sends / len(pairs) / 2)
    moments = range(1, 2 * each)
    readers = [
        Reader(
            pair, token, rng.sample(moments, min(cuts, len(moments))), random.Random(rng.random())
        )
        for pair in pairs
        for token in (pair.therapist_token, pair.prospect_token)
    ]
    ledger = Ledger()
    started = time.perf_counter()
    async with trio.open_nursery() as streams:
        for reader in readers:
            streams.start_soon(reader.run, base_url)
        for reader in readers:
            await reader.open.wait()
        talking = time.perf_counter()
        async with trio.open_nursery() as senders:
            for pair in pairs:
                for token, name in (
                    (pair.therapist_token, "therapist"),
                    (pair.prospect_token, "client"),
                ):
                    senders.start_soon(send_all, base_url, pair, token, each, ledger, name)
        talked = time.perf_counter()
        with trio.move_on_after(settle):
            while any(len(reader.shown) < 2 * each or reader.cuts_left for reader in readers):
                await trio.sleep(0.05)
        await trio.sleep(0.5)  # for what should not come any more
        streams.cancel_scope.cancel()
    delays = sorted(
        (reader.arrived[message_id] - sent) * 1000
        for reader in readers
        for message_id, sent in ledger.sent_at.items()
        if message_id in reader.arrived
    )
    return {
        "seed": seed,
        "channels": len(pairs),
        "streams": len(readers),
        "acknowledged": sum(map(len, ledger.acknowledged.values())),
        "retries": ledger.retries,
        "shown": sum(len(reader.shown) for reader in readers),
        "connections": sum(reader.connections for reader in readers),
        "sends_per_second": round(len(ledger.sent_at) / (talked - talking)),
        "send_to_shown_ms": {
            "p50": round(statistics.median(delays), 1) if delays else None,
            "p99": round(delays[int(len(delays) * 0.99)], 1) if delays else None,
        },
        "seconds": round(time.perf_counter() - started, 1),
        "violations": ledger.check(readers),
    }


def seed_pairs(count: int, data_dir: Path) -> list[Pair]:
    """New pairs from `sottovoce seed`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pairs.ndjson"
        command = [str(Path(sys.executable).parent / "sottovoce"), "seed"]
        options = ["--channels", str(count), "--out", str(out), "--data-dir", str(data_dir)]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        return [msgspec.json.decode(line, type=Pair) for line in out.read_bytes().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ready-file", type=Path, default=Path(".sottovoce/ready.json"))
    parser.add_argument("--channels", type=int, default=50)
    parser.add_argument("--sends", type=int, default=5000)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    ready = json.loads(options.ready_file.read_text())
    pairs = seed_pairs(options.channels, options.ready_file.parent)
    figures = trio.run(
        lambda: run_crowd(
            ready["base_url"], pairs, sends=options.sends, cuts=options.cuts, seed=options.seed
        )
    )
    print(json.dumps(figures, indent=2))
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
