"""Taking over from a running application, and back: two applications write to one database at once,
through cutover, rollback and cutover again, and both keep a ledger."""

import itertools
import random
import re
import socket
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import trio

from bench.takeover.application import Channel, Member, OldApplication, Sent
from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import MigrationError, migrate
from tests.support.chat import Chat, Person
from tests.support.keep_alive import KeepAlive
from tests.support.layouts import (
    GONE,
    LAPSED,
    PIA,
    TESS,
    WITH_GONE,
    WITH_LAPSED,
    WITH_PIA,
    make_layout,
    serving,
)
from tests.support.services import Database, fresh_database
from tests.system.crowd import Ledger, Pair, Reader, send_one

pytestmark = pytest.mark.once

CHANNELS = 10
WRITERS = 4
"""Connections of the old application."""
PAUSE_SECONDS = 0.01
"""How long a connection pauses between two messages: some 300 a second in all, which leaves our
servers room on two cores."""
MESSAGES = 5000
"""In all, by both applications, on each of the two layouts: at least."""
OURS_EACH = 90
"""Messages that each of a channel's two people sends through our servers."""
ALONE = 400
"""Messages that the old application stores in each part in which it is alone."""
RECONCILE_SECONDS = 1.0
SETTLE_SECONDS = 60.0
"""The longest that anything here is waited for: the machine may be busy with other things."""

SETTINGS: dict[str, Any] = {
    "SOTTOVOCE_RECONCILE_SECONDS": str(RECONCILE_SECONDS),
    "SOTTOVOCE_MAX_SENDS_PER_SECOND": "10000",
}


_numbers = itertools.count(1)


class Deployed(NamedTuple):
    """A main application's database, with channels that both applications use."""

    layout: str
    database: Database
    channels: list[Channel]

    def old_application(self) -> OldApplication:
        return OldApplication(self.database.conninfo, self.layout)


@pytest.fixture(params=["guide", "application"])
def deployed(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> Iterator[Deployed]:
    """A database of the test's own, which is not migrated yet."""
    with fresh_database(postgres) as database:
        make_layout(database, request.param)
        channels = [make_channel(database, request.param) for _ in range(CHANNELS)]
        yield Deployed(request.param, database, channels)


class Beside(NamedTuple):
    """Both applications on one database, and a channel without messages for a test of its own."""

    layout: str
    database: Database
    chat: Chat
    old: OldApplication
    channel: Channel
    prospect: Person
    """The channel's, for our server."""


@pytest.fixture(scope="module", params=["guide", "application"])
def served(
    request: pytest.FixtureRequest,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    services_folder: Path,
) -> Iterator[tuple[Deployed, Chat]]:
    """One server for each layout, after the migration."""
    with fresh_database(postgres) as database:
        make_layout(database, request.param)
        migrate(database.conninfo)
        running = serving(database, valkey.url, services_folder, workers=1, **SETTINGS)
        with running as chat:
            yield Deployed(request.param, database, []), chat


@pytest.fixture
def beside(served: tuple[Deployed, Chat]) -> Iterator[Beside]:
    deployed, chat = served
    channel = make_channel(deployed.database, deployed.layout)
    old = deployed.old_application()
    try:
        yield Beside(
            deployed.layout, deployed.database, chat, old, channel, person(channel.prospect)
        )
    finally:
        old.close()


def make_channel(database: Database, layout: str) -> Channel:
    """A new prospect of Tess's with a channel without messages, as the old application makes it."""
    name = str(next(_numbers))
    email = f"drill{name}@example.com"
    [(user_id,)] = database.execute(
        "INSERT INTO users (clerk_id, email, first_name, last_name, is_active,"
        " subscription_status) VALUES (%s, %s, 'Drill', %s, true, 'active') RETURNING id",
        (f"user_drill_{name}", email, name),
    )
    identifier = "chime_channel_arn" if layout == "application" else "channel_identifier"
    [(channel_id,)] = database.execute(
        f"INSERT INTO chat_channels ({identifier}, therapist_id, prospect_user_id, status,"
        " created_at, updated_at) VALUES (%s, 11, %s, 'active', now(), now()) RETURNING id",
        (f"drill-{name}", user_id),
    )
    tess = Member(TESS.user_id, TESS.email, "Tess Ott")
    return Channel(channel_id, tess, Member(user_id, email, f"Drill {name}"))


def person(prospect: Member) -> Person:
    """The prospect of `make_channel`'s channel, for our server."""
    first, _, number = prospect.name.partition(" ")
    return Person(prospect.user_id, f"user_drill_{number}", prospect.email, first, number)


class OldWriters:
    """The old application's connections, a thread each, which write until they are stopped."""

    def __init__(self, deployed: Deployed) -> None:
        self.applications = [deployed.old_application() for _ in range(WRITERS)]
        self.failures: list[BaseException] = []
        self._channels = deployed.channels
        self._stop = threading.Event()
        self._numbers = itertools.count(1)
        self._threads = [
            threading.Thread(target=self._write, args=(application, random.Random(number)))
            for number, application in enumerate(self.applications)
        ]

    @property
    def written(self) -> int:
        return sum(len(application.ledger) for application in self.applications)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SETTLE_SECONDS)
        assert not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        for application in self.applications:
            application.close()

    def _write(self, application: OldApplication, rng: random.Random) -> None:
        try:
            while not self._stop.wait(PAUSE_SECONDS):
                channel = rng.choice(self._channels)
                text = f"old {next(self._numbers)} {uuid.uuid4()}"
                application.send(channel, text, by_therapist=rng.random() < 0.5)
        except BaseException as failure:
            self.failures.append(failure)


class Row(NamedTuple):
    """A message as PostgreSQL has it in the end."""

    channel_id: int
    seq: int | None
    row_id: int
    message_id: str
    text: str


def violations(
    rows: Sequence[Row],
    theirs: Sequence[Sequence[Sent]],
    ours: Mapping[int, Mapping[int, str]],
    readers: Sequence[Reader],
) -> list[str]:
    """What is wrong with a take-over, a line each.

    Args:
        rows: every message, in the order of channel and number.
        theirs: the ledger of each connection of the old application.
        ours: what our servers acknowledged: channel, number, message id.
        readers: our streams.
    """
    wrong = []
    channels: dict[int, list[Row]] = {}
    for row in rows:
        channels.setdefault(row.channel_id, []).append(row)
    for channel_id, own in channels.items():
        if [row.seq for row in own] != list(range(1, len(own) + 1)):
            wrong.append(f"channel {channel_id}: the numbers are not 1 to {len(own)}")
    by_row = {row.row_id: row for row in rows}
    told = Counter(row.text for row in rows)
    wrong += [f"stored {count} times: {text}" for text, count in told.items() if count > 1]
    for connection in theirs:
        latest: dict[int, int] = {}
        for sent in connection:
            found = by_row.get(sent.row_id)
            if found is None or (found.channel_id, found.text) != (sent.channel_id, sent.text):
                wrong.append(f"lost, of the old application: {sent.text}")
            elif (found.seq or 0) <= latest.get(sent.channel_id, 0):
                wrong.append(f"out of order, of the old application: {sent.text}")
            else:
                latest[sent.channel_id] = found.seq or 0
    place = {(row.channel_id, row.seq): row for row in rows}
    for channel_id, acknowledged in ours.items():
        for seq, message_id in acknowledged.items():
            found = place.get((channel_id, seq))
            if found is None or found.message_id != message_id:
                wrong.append(f"lost, of ours: {seq} of channel {channel_id}")
    count = sum(map(len, theirs)) + sum(map(len, ours.values()))
    if len(rows) != count:
        wrong.append(f"{len(rows)} messages are stored, and {count} were acknowledged")
    for index, reader in enumerate(readers):
        own = channels[reader.pair.channel_id]
        first = reader.shown[0][0] if reader.shown else 1
        expected = [(row.seq, row.message_id) for row in own[first - 1 :]]
        if reader.shown != expected:
            wrong.append(f"stream {index} did not show {first} to {len(own)}, once and in order")
        if reader.resets:
            wrong.append(f"stream {index}: {reader.resets} resets")
    return wrong


def stored(database: Database, *channels: Channel) -> list[Row]:
    """The messages of channels, in the order of channel and number."""
    rows = database.execute(
        "SELECT channel_id, seq, id, message_id::text, content FROM chat_messages"
        " WHERE channel_id = ANY(%s) ORDER BY channel_id, seq",
        ([channel.id for channel in channels],),
    )
    return [Row(*row) for row in rows]


async def until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition()` is true."""
    with trio.move_on_after(SETTLE_SECONDS) as scope:
        while not condition():
            await trio.sleep(0.02)
    assert not scope.cancelled_caught, f"{what}: not in {SETTLE_SECONDS} s"


def fixed_port() -> int:
    """A free port that no outgoing connection takes while our server is stopped: Linux gives those
    ports from 32768 on."""
    for port in random.sample(range(20_000, 32_000), 50):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@asynccontextmanager
async def our_servers(
    deployed: Deployed, redis_url: str, folder: Path, port: int
) -> AsyncIterator[Chat]:
    """Two workers while the block lasts; the test's other tasks go on meanwhile."""
    folder.mkdir()
    with ExitStack() as stack:
        running = serving(deployed.database, redis_url, folder, port=port, **SETTINGS)
        chat = await trio.to_thread.run_sync(stack.enter_context, running)
        try:
            yield chat
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stack.close)


async def test_nothing_is_lost_doubled_or_reordered_through_cutover_rollback_and_forward_again(
    deployed: Deployed, redis_url: str, folder: Path
):
    port = fixed_port()
    writers = OldWriters(deployed)
    ledger = Ledger()
    readers: list[Reader] = []

    def acknowledged() -> int:
        return sum(map(len, ledger.acknowledged.values()))

    def begin(chat: Chat, streams: trio.Nursery, senders: trio.Nursery) -> None:
        """Open both people's streams of each channel, and let both of them talk."""
        for channel in deployed.channels:
            tokens = [chat.token(TESS), chat.token(person(channel.prospect))]
            for token in tokens:
                reader = Reader(Pair(channel.id, *tokens), token, [], random.Random(channel.id))
                readers.append(reader)
                streams.start_soon(reader.run, chat.base)
                senders.start_soon(say, chat.base, token, channel.id)

    async def say(base_url: str, token: str, channel_id: int) -> None:
        client = KeepAlive(base_url, token)
        try:
            for number in range(OURS_EACH):
                key = str(uuid.uuid4())
                text = f"ours {number} {key}"
                body = {"channelId": channel_id, "content": text, "clientMessageId": key}
                await send_one(client, body, ledger)
        finally:
            await client.aclose()

    async def old_alone() -> None:
        goal = writers.written + ALONE
        await until(lambda: writers.written >= goal or writers.failures, "the old application")

    async with trio.open_nursery() as streams:
        try:
            writers.start()
            await old_alone()
            await trio.to_thread.run_sync(migrate, deployed.database.conninfo)
            async with trio.open_nursery() as senders:
                async with our_servers(deployed, redis_url, folder / "first", port) as chat:
                    begin(chat, streams, senders)
                    half = CHANNELS * OURS_EACH
                    await until(lambda: acknowledged() >= half, "half of our messages")
                await old_alone()
                async with our_servers(deployed, redis_url, folder / "again", port):
                    everything = 2 * half
                    await until(lambda: acknowledged() == everything, "all of our messages")
                    await until(
                        lambda: writers.written + everything >= MESSAGES or writers.failures,
                        "the rest of the old application's messages",
                    )
                    await trio.to_thread.run_sync(writers.stop)
                    rows = stored(deployed.database, *deployed.channels)
                    heads = {row.channel_id: row.seq for row in rows}
                    await until(
                        lambda: all(
                            reader.shown and reader.shown[-1][0] == heads[reader.pair.channel_id]
                            for reader in readers
                        ),
                        "the last message on every stream",
                    )
                    await trio.sleep(2 * RECONCILE_SECONDS)  # for what must not come any more
                    streams.cancel_scope.cancel()
        finally:
            writers.stop()
            theirs = [application.ledger for application in writers.applications]
            pages = {
                channel.id: writers.applications[0].read(channel.id, MESSAGES)
                for channel in deployed.channels
            }
            unread = {
                channel.id: writers.applications[0].unread(channel.id)
                for channel in deployed.channels
            }
            writers.close()
    assert writers.failures == []
    assert violations(rows, theirs, ledger.acknowledged, readers) == []
    assert ledger.violations == []
    assert len(rows) >= MESSAGES
    for channel in deployed.channels:
        own = [row for row in rows if row.channel_id == channel.id]
        # The old application's page has every message, in our order.
        assert [shown.row_id for shown in pages[channel.id]] == [row.row_id for row in own]
        if unread[channel.id] is not None:
            by_therapist = sum(
                shown.author == channel.therapist.user_id for shown in pages[channel.id]
            )
            assert unread[channel.id] == (len(own) - by_therapist, by_therapist)
    # Nobody said `restored`.
    assert deployed.database.execute("SELECT epoch FROM chat_epoch") == [(0,)]


PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "take-over.md").read_text("utf-8")
ELSEWHERE, ONE_NAME, GONE_FOR_GOOD = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
"""What docs/how-to/take-over.md tells people to run."""


def test_the_pages_function_for_a_subscription_that_lives_in_another_table(
    empty_database: Database, redis_url: str, folder: Path
):
    make_layout(empty_database, "application")
    empty_database.execute("""
        CREATE TABLE subscriptions (user_id integer, status varchar(20), ends_at timestamptz);
        INSERT INTO subscriptions VALUES
            (2, 'active', now() - interval '1 day'),  -- Pia's, which is over
            (5, 'canceled', now() + interval '1 day'), (5, 'active', now() + interval '2 days');
    """)
    migrate(empty_database.conninfo)
    empty_database.execute(ELSEWHERE)
    assert migrate(empty_database.conninfo) == []  # it is kept
    with serving(empty_database, redis_url, folder, workers=1, **SETTINGS) as chat:
        with chat.stream(WITH_LAPSED, LAPSED) as stream:
            stream.connected()
            chat.send(LAPSED, WITH_LAPSED, "paid again")
            assert stream.texts(1) == ["paid again"]
        with chat.stream(WITH_PIA, PIA) as stream:
            assert stream.problem()["code"] == "SUBSCRIPTION_REQUIRED"
        assert chat.act(TESS, "list_channels").status_code == 200


def test_the_pages_function_for_a_users_table_with_a_single_name(
    empty_database: Database, redis_url: str, folder: Path
):
    make_layout(empty_database, "guide")
    empty_database.execute("""
        ALTER TABLE users RENAME clerk_id TO auth_id;
        ALTER TABLE users ADD name text, ADD closed_at timestamptz;
        UPDATE users SET name = concat_ws(' ', first_name, last_name),
            closed_at = CASE WHEN NOT is_active THEN now() END;
        ALTER TABLE users DROP first_name, DROP last_name, DROP is_active,
            DROP subscription_status;
    """)
    with pytest.raises(MigrationError, match=r"users\.clerk_id is missing"):
        migrate(empty_database.conninfo)
    empty_database.execute(ONE_NAME)
    migrate(empty_database.conninfo)
    with serving(empty_database, redis_url, folder, workers=1, **SETTINGS) as chat:
        with chat.stream(WITH_PIA, PIA) as stream:
            stream.connected().texts(4)
            sent = chat.send(PIA, WITH_PIA, "by one name")
            assert (sent["senderFirstName"], sent["senderLastName"]) == ("Pia", "Lund")
            assert stream.message()["author"] == "Pia Lund"
        with chat.stream(WITH_GONE, GONE) as stream:
            assert stream.problem()["code"] == "USER_INACTIVE"


def test_what_is_gone_for_good_can_be_taken_over_again(deployed: Deployed):
    channel, database = deployed.channels[0], deployed.database
    old = deployed.old_application()
    try:
        migrate(database.conninfo)
        old.send(channel, "one", by_therapist=True)
        database.execute(GONE_FOR_GOOD)
        old.send(channel, "two", by_therapist=False)
        assert migrate(database.conninfo) != []
        old.send(channel, "three", by_therapist=True)
    finally:
        old.close()
    rows = stored(database, channel)
    assert [(row.seq, row.text) for row in rows] == [(1, "one"), (2, "two"), (3, "three")]


@pytest.fixture
def true_record() -> tuple[list[Row], list[list[Sent]], dict[int, dict[int, str]], Reader]:
    """One channel: the old application's first and third message, ours between them."""
    rows = [Row(1, 1, 11, "a", "one"), Row(1, 2, 12, "b", "two"), Row(1, 3, 13, "c", "three")]
    theirs = [[Sent(1, 11, True, "one", 0.0), Sent(1, 13, True, "three", 0.0)]]
    reader = Reader(Pair(1, "", ""), "", [], random.Random(0))
    reader.shown = [(1, "a"), (2, "b"), (3, "c")]
    return rows, theirs, {1: {2: "b"}}, reader


def test_a_true_record_is_believed(true_record: Any):
    rows, theirs, ours, reader = true_record
    assert violations(rows, theirs, ours, [reader]) == []


@pytest.mark.parametrize(
    ("forge", "found"),
    [
        (lambda rows, theirs, ours, reader: rows.pop(0), "lost, of the old application: one"),
        (lambda rows, theirs, ours, reader: rows.pop(1), "lost, of ours: 2"),
        (lambda rows, theirs, ours, reader: rows.append(Row(1, 4, 14, "d", "one")), "stored 2"),
        (lambda rows, theirs, ours, reader: rows.append(Row(1, 5, 14, "d", "x")), "are not 1 to 4"),
        (lambda rows, theirs, ours, reader: theirs[0].reverse(), "out of order"),
        (lambda rows, theirs, ours, reader: ours[1].update({2: "x"}), "lost, of ours: 2"),
        (lambda rows, theirs, ours, reader: rows.append(Row(1, 4, 14, "d", "x")), "4 messages"),
        (lambda rows, theirs, ours, reader: reader.shown.pop(), "stream 0 did not show 1 to 3"),
        (lambda rows, theirs, ours, reader: reader.shown.reverse(), "stream 0 did not show"),
    ],
    ids=[
        "lost",
        "ours lost",
        "doubled",
        "hole",
        "reordered",
        "swapped",
        "leaked",
        "unshown",
        "mixed",
    ],
)
def test_a_forged_record_is_caught(true_record: Any, forge: Callable[..., object], found: str):
    rows, theirs, ours, reader = true_record
    forge(rows, theirs, ours, reader)
    assert any(found in line for line in violations(rows, theirs, ours, [reader]))


def test_our_streams_show_what_the_old_application_stores(beside: Beside):
    chat, channel = beside.chat, beside.channel
    with chat.stream(channel.id, TESS) as stream:
        stream.connected()
        for number in range(1, 6):
            text = f"from the old one {number}"
            sent = beside.old.send(channel, text, by_therapist=number % 2 == 0)
            event = stream.next(seconds=SETTLE_SECONDS)
            assert event.id == str(number)
            assert f'"text":"{text}"' in event.data
            author = channel.therapist if sent.by_therapist else channel.prospect
            assert f'"author":"{author.name}"' in event.data
            assert f'"authorEmail":"{author.email}"' in event.data
        assert chat.send(beside.prospect, channel.id, "from ours")["seq"] == 6
        assert stream.message()["text"] == "from ours"


def test_the_old_applications_readers_find_our_messages_in_their_columns(beside: Beside):
    chat, old, channel = beside.chat, beside.old, beside.channel
    old.send(channel, "theirs 1", by_therapist=False)
    ours = [
        chat.send(beside.prospect, channel.id, "ours 2"),
        chat.send(TESS, channel.id, "ours 3"),
    ]
    old.send(channel, "theirs 4", by_therapist=True)
    shown = old.read(channel.id, 50)
    assert [each.text for each in shown] == ["theirs 1", "ours 2", "ours 3", "theirs 4"]
    for each, message in zip(shown[1:3], ours, strict=True):
        assert each.row_id == message["id"]
        if beside.layout == "application":
            assert each.author == message["senderId"]
            assert (each.status, each.external_id) == ("sent", message["messageId"])
        else:
            assert each.author == message["senderEmail"]
    [(preview,)] = beside.database.execute(
        "SELECT last_message_preview FROM chat_channels WHERE id = %s", (channel.id,)
    )
    assert preview == "theirs 4"


def test_both_applications_count_and_clear_the_same_unread_messages(beside: Beside):
    chat, old, channel = beside.chat, beside.old, beside.channel

    def ours() -> tuple[int, int]:
        counts = []
        for who in (TESS, beside.prospect):
            listed = chat.act(who, "list_channels").json()["channels"]
            counts += [each["unreadCount"] for each in listed if each["id"] == channel.id]
        return counts[0], counts[1]

    chat.send(beside.prospect, channel.id, "ours")
    old.send(channel, "theirs", by_therapist=False)
    chat.send(TESS, channel.id, "ours, too")
    assert ours() == (2, 1)
    assert old.unread(channel.id) in ((2, 1), None)
    assert chat.act(TESS, "mark_read", channelId=channel.id).status_code == 200
    assert ours() == (0, 1)
    assert old.unread(channel.id) in ((0, 1), None)
    if beside.layout == "application":
        old.mark_read(channel, by_therapist=False)
        assert ours() == (0, 0)


def test_a_channel_that_the_old_application_makes_is_ours_too(beside: Beside):
    """`beside` has it made after the migration."""
    with beside.chat.stream(beside.channel.id, beside.prospect) as stream:
        stream.connected()
        beside.old.send(beside.channel, "the first", by_therapist=True)
        assert stream.next(seconds=SETTLE_SECONDS).id == "1"
        sent = beside.chat.send(beside.prospect, beside.channel.id, "the second")
        assert sent["seq"] == 2


def test_an_insert_that_is_taken_back_or_does_nothing_leaves_no_hole(beside: Beside):
    channel = beside.channel
    beside.old.send(channel, "one", by_therapist=True)
    names, given = {
        "guide": ("author_email, author_name", "'tess@example.com', 'Tess Ott'"),
        "application": ("chime_message_id, sender_id, sent_at, created_at", "{}, 1, now(), now()"),
    }[beside.layout]

    def insert(*texts: str) -> str:
        rows = ", ".join(f"({channel.id}, '{text}', {given.format(repr(text))})" for text in texts)
        return f"INSERT INTO chat_messages (channel_id, content, {names}) VALUES {rows}"

    with psycopg.connect(**beside.database.conninfo) as connection:
        connection.execute(insert("taken back").encode())
        connection.rollback()
        connection.execute(insert("two", "three").encode())
        connection.execute("SAVEPOINT before")
        connection.execute(insert("taken back, too").encode())
        connection.execute("ROLLBACK TO SAVEPOINT before")
        if beside.layout == "application":
            connection.execute(f"{insert('two')} ON CONFLICT DO NOTHING".encode())
        connection.commit()
    assert beside.chat.send(beside.prospect, channel.id, "four")["seq"] == 4
    rows = stored(beside.database, channel)
    assert [row.seq for row in rows] == [1, 2, 3, 4]
    assert [row.text for row in rows] == ["one", "two", "three", "four"]
    assert len({row.message_id for row in rows}) == 4


def test_messages_of_a_channel_become_visible_in_their_order(beside: Beside):
    """A transaction of the old application's that lasts holds the channel: what is sent through our
    servers meanwhile waits or is refused, and is never numbered before it."""
    chat, channel = beside.chat, beside.channel
    body = {"channelId": channel.id, "content": "two", "clientMessageId": str(uuid.uuid4())}
    second = OldApplication(beside.database.conninfo, beside.layout)
    try:
        with beside.old.transaction():
            beside.old.send(channel, "one", by_therapist=True)
            assert chat.post("/api/chat/send", beside.prospect, body).status_code == 503
            later = threading.Thread(
                target=partial(second.send, channel, "another", by_therapist=False)
            )
            later.start()
        later.join(SETTLE_SECONDS)
        assert not later.is_alive()
        assert chat.post("/api/chat/send", beside.prospect, body).status_code == 200
    finally:
        second.close()
    rows = stored(beside.database, channel)
    assert [(row.seq, row.text) for row in rows] == [(1, "one"), (2, "another"), (3, "two")]


def test_a_message_that_the_old_application_deletes_holds_up_no_stream(beside: Beside):
    """It leaves a hole in the numbers, which nobody fills."""
    chat, channel = beside.chat, beside.channel
    with chat.stream(channel.id, TESS) as stream:
        stream.connected()
        with beside.old.transaction():
            first = beside.old.send(channel, "one", by_therapist=False)
            beside.old.send(channel, "two", by_therapist=False)
            beside.old.delete(first)
        assert stream.next(seconds=SETTLE_SECONDS).id == "2"
        assert chat.send(beside.prospect, channel.id, "three")["seq"] == 3
        assert stream.next(seconds=SETTLE_SECONDS).id == "3"
    with chat.stream(channel.id, TESS) as stream:
        assert stream.connected().texts(2) == ["two", "three"]
