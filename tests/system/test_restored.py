"""The database is restored to an earlier point: the numbers come a second time, and nothing of the
future that is gone is shown to anybody, whether the servers were stopped for it or not."""

import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis

from protocol.parser import ServerSentEvent
from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import migrate
from tests.server.test_cli import database_environment
from tests.support.chat import Chat, Events, Pair, Person, eventually, own_valkey, run_chat
from tests.support.running import run_command
from tests.support.services import Database

pytestmark = pytest.mark.once

KEPT = 60
LOST = 10
NOTICED_SECONDS = 3.0
"""Two for the look, and the rest for a busy machine."""


class World:
    """PostgreSQL, whose data can be put back, and a Valkey that knows nothing of it."""

    def __init__(self, folder: Path, postgres: EmbeddedPostgres, valkey: EmbeddedValkey) -> None:
        self.folder = folder
        self.postgres = postgres
        self.valkey = valkey
        self.database = Database(postgres.conninfo, postgres.url)
        self._data = postgres.data_dir / "cluster"
        self._copy = postgres.data_dir / "copy"

    @contextmanager
    def worker(self) -> Iterator[Chat]:
        with run_chat(self.database, self.valkey.url, self.folder) as chat:
            yield chat

    def back_up(self) -> None:
        self.postgres.stop()
        subprocess.run(["cp", "-a", str(self._data), str(self._copy)], check=True)  # with owners
        self.postgres.start()

    def restore(self) -> None:
        self.postgres.stop()
        shutil.rmtree(self._data)
        subprocess.run(["cp", "-a", str(self._copy), str(self._data)], check=True)
        self.postgres.start()

    def say_so(self) -> int:
        """`sottovoce restored`; the new epoch."""
        done = run_command("restored", **database_environment(self.database))
        assert done.returncode == 0, done.stderr
        found = re.fullmatch(r"epoch \d+ -> (\d+)\n", done.stdout)
        assert found
        return int(found[1])

    def stored(self, pair: Pair) -> list[tuple[int, str]]:
        return self.database.execute(
            "SELECT seq, content FROM chat_messages WHERE channel_id = %s ORDER BY seq",
            (pair.channel_id,),
        )

    def recent_keys(self) -> list[str]:
        with redis.Redis.from_url(self.valkey.url) as client:
            return sorted(key.decode() for key in client.keys("*:recent"))


@pytest.fixture
def world(services_folder: Path, folder: Path) -> Iterator[World]:
    with (
        EmbeddedPostgres(folder / "postgres", durable=False) as postgres,
        own_valkey(services_folder) as valkey,
    ):
        migrate(postgres.conninfo)
        yield World(folder, postgres, valkey)


def talk(chat: Chat, pair: Pair, word: str, first: int, last: int) -> None:
    for number in range(first, last + 1):
        chat.send(pair.therapist, pair.channel_id, f"{word} {number}")


def send_until_taken(chat: Chat, pair: Pair, text: str, client_id: str) -> dict[str, Any]:
    """As a client does: while it is refused, the same again."""
    body = {"channelId": pair.channel_id, "content": text, "clientMessageId": client_id}

    def send() -> httpx.Response | None:
        response = chat.post("/api/chat/send", pair.therapist, body)
        assert response.status_code in (200, 503), response.text
        return response if response.status_code == 200 else None

    message: dict[str, Any] = eventually(send).json()["message"]
    return message


class Shown(NamedTuple):
    reset: bool
    ids: list[str]
    texts: list[str]


def page(events: Events, count: int) -> Shown:
    """What a stream begins with: so many messages, after a reset or without one."""
    events.connected()
    reset = False
    messages: list[ServerSentEvent] = []
    while len(messages) < count:
        event: ServerSentEvent = events.next()
        if event.event == "reset":
            assert not messages and event.id == "", "it comes first, and forgets the cursor"
            reset = True
            continue
        assert event.event == "message", event
        messages.append(event)
    texts = [httpx.Response(200, content=each.data).json()["text"] for each in messages]
    return Shown(reset, [each.id for each in messages], texts)


def opened(chat: Chat, pair: Pair, count: int, *, cursor: str = "", who: str = "prospect") -> Shown:
    person: Person = getattr(pair, who)
    headers = {"last-event-id": cursor} if cursor else {}
    with chat.stream(pair.channel_id, person, headers) as events:
        return page(events, count)


def restored_page(epoch: int, *, last: int = KEPT) -> Shown:
    """The newest 50, where nothing was said since."""
    numbers = range(last - 49, last + 1)
    return Shown(False, [f"{epoch}.{n}" for n in numbers], [f"kept {n}" for n in numbers])


def test_servers_that_were_stopped_for_it(world: World):
    client_id = str(uuid.uuid4())
    with world.worker() as chat:
        pair = chat.pair()
        talk(chat, pair, "kept", 1, KEPT)
    world.back_up()
    with world.worker() as chat, chat.stream(pair.channel_id, pair.prospect) as events:
        page(events, 50)
        send_until_taken(chat, pair, f"lost {KEPT + 1}", client_id)
        talk(chat, pair, "lost", KEPT + 2, KEPT + LOST)
        lost = events.texts(LOST)
        assert (lost[0], lost[-1]) == (f"lost {KEPT + 1}", f"lost {KEPT + LOST}")
        assert events.parser.last_event_id == f"{KEPT + LOST}"
    assert len(world.recent_keys()) == 1, "the lost future is in Redis"

    world.restore()
    epoch = world.say_so()
    with world.worker() as chat:
        ids = [f"{KEPT + LOST}", f"{KEPT}", "1", f"{epoch - 1}.{KEPT}", f"{epoch + 1}.1"]
        for cursor in ids:
            assert opened(chat, pair, 50, cursor=cursor) == restored_page(epoch)._replace(
                reset=True
            )
        assert opened(chat, pair, 50, who="therapist") == restored_page(epoch)
        history = chat.act(pair.prospect, "get_messages", channelId=pair.channel_id).json()
        assert [each["content"] for each in history["messages"]] == restored_page(epoch).texts

        last = f"{epoch}.{KEPT}"
        with (
            chat.stream(pair.channel_id, pair.prospect, {"last-event-id": last}) as one,
            chat.stream(pair.channel_id, pair.therapist) as other,
        ):
            one.connected()
            page(other, 50)
            message = send_until_taken(chat, pair, "new, with an id of the lost future", client_id)
            assert message["seq"] == KEPT + 1
            for stream in (one, other):
                assert stream.message()["text"] == "new, with an id of the lost future"
                assert stream.parser.last_event_id == f"{epoch}.{KEPT + 1}"
            talk(chat, pair, "new", KEPT + 2, KEPT + LOST + 5)
            expected = [f"new {n}" for n in range(KEPT + 2, KEPT + LOST + 6)]
            for stream in (one, other):
                assert stream.texts(LOST + 4) == expected, "once each"
        # Past the numbers that the lost future had: its cursor is still none of ours.
        late = opened(chat, pair, 50, cursor=f"{KEPT + LOST}")
        assert late.reset and late.texts[-1] == expected[-1]
        again = opened(chat, pair, 2, cursor=f"{epoch}.{KEPT + LOST + 3}")
        assert again == Shown(False, [f"{epoch}.{KEPT + LOST + n}" for n in (4, 5)], expected[-2:])
    assert [seq for seq, _ in world.stored(pair)] == list(range(1, KEPT + LOST + 6))


def test_redis_is_used_again(world: World):
    with world.worker() as chat:
        pair = chat.pair()
        talk(chat, pair, "kept", 1, KEPT)
    world.back_up()
    world.restore()
    epoch = world.say_so()
    with world.worker() as one, world.worker() as two:
        assert opened(one, pair, 50) == restored_page(epoch)
        keys = eventually(lambda: [key for key in world.recent_keys() if f":{epoch}:" in key])
        assert len(keys) == 1

        def from_redis() -> float:
            found = re.search(r'history_reads_total\{source="redis"\} (\S+)', metrics(two))
            return float(found[1]) if found else 0.0

        assert from_redis() == 0
        assert opened(two, pair, 50, who="therapist") == restored_page(epoch)
        assert from_redis() == 1
        with two.stream(pair.channel_id, pair.prospect, {"last-event-id": f"{epoch}.60"}) as events:
            events.connected()
            took = []
            for number in range(10):
                began = time.monotonic()
                one.send(pair.therapist, pair.channel_id, f"new {number}")
                assert events.message()["text"] == f"new {number}"
                took.append(time.monotonic() - began)
            assert sorted(took)[5] < 0.25, "by pub/sub, not by the look every four seconds"


def metrics(chat: Chat) -> str:
    return chat.client.get("/metrics").text


def wait_until_in(epoch: int, *chats: Chat) -> None:
    """Until the workers have gone over to an epoch, and end what they had in the last one."""

    def is_in(chat: Chat) -> bool:
        known, over = chat.log_lines("epoch_known"), chat.log_lines("epoch_over")
        return known[-1]["epoch"] == epoch and len(chat.log_lines("draining")) == len(over)

    eventually(lambda: all(map(is_in, chats)), seconds=NOTICED_SECONDS)


def all_drained(chat: Chat) -> bool:
    return len(chat.log_lines("drained")) == len(chat.log_lines("draining"))


def test_servers_that_run_meanwhile(world: World):
    with world.worker() as one, world.worker() as two:
        pair = one.pair()
        talk(one, pair, "kept", 1, KEPT)
        world.back_up()
        eventually(lambda: one.client.get("/readyz").status_code == 200)
        eventually(lambda: two.client.get("/readyz").status_code == 200)
        epochs = []
        for _ in range(2):  # of one backup
            streams = [
                one.stream(pair.channel_id, pair.prospect),
                two.stream(pair.channel_id, pair.therapist),
            ]
            for events in streams:
                page(events, 50)
            client_id = str(uuid.uuid4())
            send_until_taken(one, pair, "lost", client_id)
            talk(one, pair, "lost", KEPT + 2, KEPT + LOST)
            for events in streams:
                events.texts(LOST)
            lost_cursor = streams[0].parser.last_event_id

            world.restore()
            epoch = world.say_so()
            assert epoch not in epochs, "it is another one, whatever the backup says"
            epochs.append(epoch)
            # At once, while they may not have noticed yet: refused, or stored in the new epoch.
            message = send_until_taken(two, pair, "new", client_id)
            assert message["seq"] == KEPT + 1
            wait_until_in(epoch, one, two)
            for events in streams:
                with events:
                    closing = events.next()
                    assert closing.event == "closing"
                    assert closing.data == '{"reason":"drain","reconnect":true}'
                    events.wait_for_end()
            expected = restored_page(epoch, last=KEPT + 1)
            expected = expected._replace(texts=[*expected.texts[:-1], "new"])
            for chat in (one, two):
                for cursor in (lost_cursor, f"{KEPT}"):
                    shown = opened(chat, pair, 50, cursor=cursor)
                    assert shown == expected._replace(reset=True)
                assert opened(chat, pair, 50, who="therapist") == expected
            with one.stream(pair.channel_id, pair.prospect) as here:
                page(here, 50)
                two.send(pair.therapist, pair.channel_id, "from the other worker")
                assert here.message()["text"] == "from the other worker"
                assert here.parser.last_event_id == f"{epoch}.{KEPT + 2}"
            assert [seq for seq, _ in world.stored(pair)] == list(range(1, KEPT + 3))
        for chat in (one, two):
            assert chat.log_lines("task_failed") == chat.log_lines("stream_failed") == []
            eventually(partial(all_drained, chat))
        closed = (
            "SELECT count(*) FROM chat_audit WHERE action = 'stream_closed' AND detail = 'drain'"
        )
        eventually(lambda: world.database.execute(closed) == [(2,)])


def test_a_chat_that_was_turned_off_stays_off(world: World):
    file = world.folder / "env"
    file.write_text("NEXT_PUBLIC_ENABLE_CHAT_FEATURE=true\n")
    with run_chat(world.database, world.valkey.url, world.folder, env_file=file) as chat:
        pair = chat.pair()
        chat.send(pair.therapist, pair.channel_id, "on")
        file.write_text("NEXT_PUBLIC_ENABLE_CHAT_FEATURE=false\n")
        chat.process.send_signal(signal.SIGHUP)
        eventually(lambda: not chat.client.get("/readyz").json()["enabled"])
        world.say_so()
        eventually(lambda: chat.log_lines("drained"))
        assert chat.client.get("/readyz").json()["enabled"] is False
