"""The chat as its clients meet it: one real worker on a real port, people, and event streams.

Everything here is plain and blocks: a test that talks to a server needs no event loop.
"""

import base64
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

from protocol.parser import EventStreamParser, ServerSentEvent
from server.engine.sockets import listen
from storage.embedded import EmbeddedValkey
from tests.support.services import Database
from tests.support.tokens import Signer
from tests.support.wire import WIRE, End, Head

ROOT = Path(__file__).parents[2]
APP_ORIGIN = "https://app.example.com"
START_SECONDS = 30.0
WAIT_SECONDS = 10.0

PUBLISHABLE_KEY = "pk_test_" + base64.b64encode(b"clerk.example.com$").decode()
"""Names `tokens.ISSUER`."""

_numbers = itertools.count(1)


class Person(NamedTuple):
    user_id: int
    clerk_id: str
    email: str
    first_name: str
    last_name: str
    therapist_id: int | None = None


class Pair(NamedTuple):
    """A channel and its two people."""

    channel_id: int
    therapist: Person
    prospect: Person


class Chat:
    """One worker, its database and its people. Made by `run_chat`."""

    def __init__(self, database: Database, signer: Signer, port: int, log: Path) -> None:
        self.database = database
        self.signer = signer
        self.port = port
        self.log = log
        self.base = f"{WIRE.scheme}://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.base, timeout=WAIT_SECONDS, **WIRE.client)
        self.process: subprocess.Popen[bytes]

    # People

    def person(
        self,
        *,
        subscription: str | None = "active",
        active: bool = True,
        employer: int | None = None,
        first_name: str = "Ada",
        last_name: str = "Ng",
        email: str | None = None,
    ) -> Person:
        number = next(_numbers)
        clerk_id = f"user_{number}"
        email = email or f"person{number}@example.com"
        [(user_id,)] = self.database.execute(
            "INSERT INTO users (clerk_id, email, first_name, last_name, is_active,"
            " subscription_status, employer_id) VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING id",
            (clerk_id, email, first_name, last_name, active, subscription, employer),
        )
        return Person(user_id, clerk_id, email, first_name, last_name)

    def therapist(self, *, title: str | None = "PhD", **about: Any) -> Person:
        """Without a subscription: a therapist needs none."""
        person = self.person(**{"subscription": None, **about})
        return self.as_therapist(person, title=title)

    def as_therapist(self, person: Person, *, title: str | None = "PhD") -> Person:
        [(therapist_id,)] = self.database.execute(
            "INSERT INTO therapists (user_id, name, title) VALUES (%s, %s, %s) RETURNING id",
            (person.user_id, f"Dr {person.last_name}", title),
        )
        return person._replace(therapist_id=therapist_id)

    def channel(self, therapist: Person, prospect: Person) -> int:
        [(channel_id,)] = self.database.execute(
            "INSERT INTO chat_channels (channel_identifier, therapist_id, prospect_user_id)"
            " VALUES (%s, %s, %s) RETURNING id",
            (f"channel-{next(_numbers)}", therapist.therapist_id, prospect.user_id),
        )
        return int(channel_id)

    def pair(self, therapist: Person | None = None, prospect: Person | None = None) -> Pair:
        """A new channel, of new people unless told."""
        therapist = therapist or self.therapist(first_name="Tess", last_name="Ott")
        prospect = prospect or self.person(first_name="Pia", last_name="Lund")
        return Pair(self.channel(therapist, prospect), therapist, prospect)

    def token(self, person: Person, **overrides: Any) -> str:
        now = time.time()
        claims = {"sub": person.clerk_id, "exp": int(now) + 3600, **overrides}
        return self.signer.mint(now=now, **claims)

    def bearer(self, person: Person | None) -> dict[str, str]:
        """No header at all for nobody."""
        return {} if person is None else {"authorization": f"Bearer {self.token(person)}"}

    # Requests

    def get(
        self, path: str, person: Person | None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        return self.client.get(path, headers={**self.bearer(person), **(headers or {})})

    def post(
        self,
        path: str,
        person: Person | None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """A body of bytes goes out as it is, anything else as JSON."""
        sent = {**self.bearer(person), **(headers or {})}
        if isinstance(body, bytes):
            sent.setdefault("content-type", "application/json")
            return self.client.post(path, headers=sent, content=body)
        return self.client.post(path, headers=sent, json=body)

    def send(self, person: Person, channel_id: int, text: str, **more: Any) -> dict[str, Any]:
        """Send a message that is taken; the reply's `message`."""
        body = {"channelId": channel_id, "content": text, **more}
        response = self.post("/api/chat/send", person, body)
        assert response.status_code == 200, response.text
        message: dict[str, Any] = response.json()["message"]
        return message

    def act(self, person: Person | None, action: str, **body: Any) -> httpx.Response:
        return self.post("/api/chat/messaging", person, {"action": action, **body})

    def stream(
        self,
        channel_id: int | str,
        person: Person | None,
        headers: Mapping[str, str] | None = None,
    ) -> "Events":
        return Events(
            self.port, f"/api/chat/{channel_id}", {**self.bearer(person), **(headers or {})}
        )

    # What is behind

    def stored(self, channel_id: int) -> int:
        """Messages of a channel that are in PostgreSQL."""
        [(count,)] = self.database.execute(
            "SELECT count(*) FROM chat_messages WHERE channel_id = %s", (channel_id,)
        )
        return int(count)

    def audit(self, request_id: str) -> dict[str, Any]:
        """The audit row of a request; waits for it."""

        def look() -> dict[str, Any] | None:
            rows = self.database.execute(
                "SELECT to_jsonb(a) FROM chat_audit a WHERE request_id = %s ORDER BY id",
                (request_id,),
            )
            return rows[0][0] if rows else None

        row: dict[str, Any] = eventually(look)
        return row

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        raw = self.log.read_bytes().splitlines()
        lines = [json.loads(line) for line in raw if line.startswith(b"{")]
        return [line for line in lines if line.get("event") == event]


class Events:
    """One event stream over a raw socket, or its refusal.

    Attributes:
        status, headers: of the response.
        parser: its `last_event_id` and `retry` are what the stream said.
    """

    def __init__(self, port: int, target: str, headers: Mapping[str, str]) -> None:
        self.parser = EventStreamParser()
        self.ended = False
        self._body = b""
        self._ready: list[ServerSentEvent] = []
        self._socket = WIRE.connect(port, timeout=WAIT_SECONDS)
        self._http = WIRE.http()
        sent = {"host": f"127.0.0.1:{port}", "accept": "text/event-stream", **headers}
        fields = list(sent.items())
        try:
            self._socket.sendall(self._http.request("GET", target, fields))
            head = self._next_part(WAIT_SECONDS)
            assert isinstance(head, Head), head
        except BaseException:
            self._socket.close()
            raise
        self.status = head.status
        self.headers = httpx.Headers(head.headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def next(self, *, seconds: float = WAIT_SECONDS, heartbeats: bool = False) -> ServerSentEvent:
        """The next event.

        Raises:
            TimeoutError: none came.
            EOFError: the stream has ended.
        """
        deadline = time.monotonic() + seconds
        while True:
            while self._ready:
                event = self._ready.pop(0)
                if heartbeats or event.event != "heartbeat":
                    return event
            self._read(deadline)

    def message(self, **how: Any) -> dict[str, Any]:
        """The next event's JSON, which is a chat message."""
        event = self.next(**how)
        assert event.event == "message", event.event
        data: dict[str, Any] = json.loads(event.data)
        assert "text" in data, data.keys()
        return data

    def texts(self, count: int) -> list[str]:
        return [self.message()["text"] for _ in range(count)]

    def connected(self) -> Self:
        """Past the first event."""
        assert self.status == 200, self.body()
        assert json.loads(self.next().data)["type"] == "connected"
        return self

    def body(self) -> bytes:
        """The whole body of a refusal."""
        self.wait_for_end()
        return self._body

    def problem(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body())
        return body

    def wait_for_end(self, *, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.ended:
            try:
                self._read(deadline)
            except EOFError:
                return

    def _read(self, deadline: float) -> None:
        if self.ended:
            raise EOFError
        part = self._next_part(deadline - time.monotonic())
        if isinstance(part, bytes):
            self._body += part
            if self.status == 200:
                self._ready += self.parser.feed(part)
        else:
            self.ended = True

    def _next_part(self, seconds: float) -> Head | bytes | End:
        deadline = time.monotonic() + seconds
        while (part := self._http.next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            if answer := self._http.receive(self._socket.recv(65536)):
                self._socket.sendall(answer)
        return part


def eventually(look: Callable[[], Any], *, seconds: float = WAIT_SECONDS) -> Any:
    """What `look` returns as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def environment(database: Database, redis_url: str, signer: Signer) -> dict[str, str]:
    """Settings of a worker for tests, over a clean environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOTTOVOCE_")}
    conninfo = database.conninfo
    return {
        **clean,
        "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": "true",
        "UPSTASH_REDIS_URL": redis_url,
        "DB_HOST": str(conninfo["host"]),
        "DB_PORT": str(conninfo["port"]),
        "DB_USER": conninfo["user"],
        "DB_PASSWORD": conninfo["password"],
        "DB_DATABASE": conninfo["dbname"],
        "SOTTOVOCE_DB_SSLMODE": "disable",
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": PUBLISHABLE_KEY,
        "CLERK_JWT_KEY": signer.pem,
        "SOTTOVOCE_ALLOWED_ORIGINS": APP_ORIGIN,
        "SOTTOVOCE_HEARTBEAT_SECONDS": "0.5",
        "SOTTOVOCE_RECHECK_SECONDS": "0.4",
        "SOTTOVOCE_ACCESS_CACHE_SECONDS": "0.1",
        "SOTTOVOCE_BODY_SECONDS": "1",
        "SOTTOVOCE_DRAIN_SECONDS": "0.1",
        "SOTTOVOCE_LOG_LEVEL": "debug",
    }


@contextmanager
def run_chat(
    database: Database,
    redis_url: str,
    folder: Path,
    *,
    env_file: Path | None = None,
    **settings: str,
) -> Iterator[Chat]:
    """A worker that serves until the block ends.

    Args:
        folder: its log goes there.
        settings: over those of `environment`.
    """
    signer = Signer()
    log = folder / f"worker-{next(_numbers)}.log"
    env = {**environment(database, redis_url, signer), **settings}
    ready, worker_end = os.pipe()
    lifeline, our_end = os.pipe()
    with listen("127.0.0.1", 0, stall_seconds=20.0) as sock, log.open("wb") as output:
        command = [
            *(sys.executable, "-m", "server.engine.worker", *WIRE.options.arguments()),
            *("--fd", str(sock.fileno()), "--ready-fd", str(worker_end)),
            *(("--env-file", str(env_file)) if env_file else ()),
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=lifeline,
            stdout=output,
            stderr=output,
            pass_fds=(sock.fileno(), worker_end),
        )
        port = sock.getsockname()[1]
    chat = Chat(database, signer, port, log)
    chat.process = process
    try:
        os.close(worker_end)
        assert os.read(ready, 1), log.read_text()
        yield chat
    finally:
        chat.client.close()
        process.terminate()
        try:
            process.wait(START_SECONDS)
        finally:
            process.kill()
            process.wait()
            for descriptor in (ready, lifeline, our_end):
                os.close(descriptor)


@contextmanager
def own_valkey(folder: Path) -> Iterator[EmbeddedValkey]:
    """A Valkey for one database: its keys know channels by number, not by database."""
    with EmbeddedValkey(folder / f"valkey-{next(_numbers)}", durable=False) as server:
        yield server
