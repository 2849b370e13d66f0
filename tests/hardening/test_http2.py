"""HTTP/2, which Hypercorn speaks on every path: also to a client that does not ask first."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import h2.config
import h2.connection
import h2.events
import pytest

from tests.support.chat import WAIT_SECONDS, Chat, eventually
from tests.support.wire import WIRE


class Connection:
    """A client's connection, with any number of streams on it.

    Attributes:
        status: number of a stream → its answer's.
        ended: the streams whose answers are whole.
        data: number of a stream → what has come of its body.
    """

    def __init__(self, chat: Chat) -> None:
        self._socket = WIRE.connect(chat.port, timeout=WAIT_SECONDS)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.status: dict[int, int] = {}
        self.ended: set[int] = set()
        self.data: dict[int, bytes] = {}

    def request(
        self, method: str, path: str, headers: dict[str, str], *, body_follows: bool = False
    ) -> int:
        """Its stream's number."""
        pseudo = {":method": method, ":scheme": WIRE.scheme, ":authority": "x", ":path": path}
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [*pseudo.items(), *headers.items()], not body_follows)
        self.flush()
        return stream

    def flush(self) -> None:
        self._socket.sendall(self.h2.data_to_send())

    def read(self) -> None:
        data = self._socket.recv(65536)
        assert data, "the connection was ended"
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    self.status[event.stream_id] = int(dict(event.headers)[b":status"])
                case h2.events.DataReceived():
                    data = self.data.get(event.stream_id, b"") + event.data
                    self.data[event.stream_id] = data
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
        self.flush()

    def close(self) -> None:
        self._socket.close()


@contextmanager
def connected(chat: Chat) -> Iterator[Connection]:
    connection = Connection(chat)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("late", [b"x" * 100, b""], ids=["bytes", "its end alone"])
def test_a_body_that_goes_on_after_its_answer_ends_no_other_stream(chat: Chat, late: bytes):
    """Behind a proxy the others on the connection are other people's."""
    pair = chat.pair()
    with connected(chat) as client:
        stream = client.request("GET", f"/api/chat/{pair.channel_id}", chat.bearer(pair.prospect))
        while b"connected" not in client.data.get(stream, b""):
            client.read()
        post = client.request(
            "POST",
            "/api/chat/send",
            {"authorization": "Bearer x", "content-type": "application/json"},
            body_follows=True,
        )
        while post not in client.ended:
            client.read()
        assert client.status[post] == 401
        client.h2.send_data(post, late, end_stream=True)
        client.flush()
        time.sleep(0.1)
        chat.send(pair.therapist, pair.channel_id, "still here")
        while b"still here" not in client.data[stream]:
            client.read()


def test_a_stream_that_its_client_resets_ends_and_the_others_go_on(chat: Chat):
    pair = chat.pair()
    path = f"/api/chat/{pair.channel_id}"
    with connected(chat) as client:
        left, kept = (client.request("GET", path, chat.bearer(who)) for who in pair[1:])
        while not all(b"connected" in client.data.get(stream, b"") for stream in (left, kept)):
            client.read()
        client.h2.reset_stream(left)
        client.flush()

        def closed() -> list[int]:
            lines = chat.log_lines("stream_closed")
            return [line["user_id"] for line in lines if line["channel_id"] == pair.channel_id]

        assert eventually(closed) == [pair.therapist.user_id]
        chat.send(pair.therapist, pair.channel_id, "still here")
        while b"still here" not in client.data[kept]:
            client.read()
        assert len(closed()) == 1
