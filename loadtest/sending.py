"""POSTs, and the pace at which they are sent. A send that fails is repeated with its id."""

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import gevent
import msgspec
from gevent.pool import Pool
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from loadtest.figures import SEND
from loadtest.manners import message
from loadtest.people import Seat

if TYPE_CHECKING:
    from loadtest.session import Session

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
ATTEMPTS = 5
"""With one to two seconds between them a send outlives what the server answers 503 for."""
PACER_CONNECTIONS = 64
"""Sends under way at once; more wait, and it counts as theirs."""


class NotSent(Exception):
    """No attempt was acknowledged."""


class _Numbered(msgspec.Struct):
    seq: int


class _Sent(msgspec.Struct):
    message: _Numbered


_decode_sent = msgspec.json.Decoder(_Sent).decode


class Api:
    """The server's POSTs over keep-alive connections.

    Args:
        session: of this process.
        connections: at most.
    """

    def __init__(self, session: "Session", *, connections: int = 1) -> None:
        self._session = session
        self._http = HTTPClient.from_url(
            session.url,
            concurrency=connections,
            connection_timeout=CONNECT_SECONDS,
            network_timeout=ANSWER_SECONDS,
        )

    def close(self) -> None:
        self._http.close()

    def act(self, seat_token: str, action: str, **fields: Any) -> Any:
        """`POST /api/chat/messaging`; its reply, or None if it failed."""
        body = msgspec.json.encode({"action": action, **fields})
        answer = self._post("/api/chat/messaging", action, seat_token, body)
        return None if answer is None else msgspec.json.decode(answer)

    def send(self, seat: Seat, *, due: float) -> None:
        """Send a message that was due at `due` (on `time.monotonic`), until it is acknowledged.

        Raises:
            NotSent
        """
        body = msgspec.json.encode(
            {
                "channelId": seat.channel_id,
                "content": message(self._session.random, due),
                "messageType": "STANDARD",
                "clientMessageId": seat.new_message_id(),
            }
        )
        ledger = self._session.ledger
        ledger.sending(seat.channel_id)
        sent_at = time.monotonic()
        for attempt in range(ATTEMPTS):
            if attempt:
                gevent.sleep(random.uniform(1.0, 2.0))
            answer = self._post("/api/chat/send", SEND, seat.token, body)
            if answer is not None:
                seq = _decode_sent(answer).message.seq
                now = time.monotonic()
                ledger.acknowledged(seat.channel_id, seq, sent_at=sent_at, now=now)
                return
        raise NotSent

    def _post(self, path: str, name: str, token: str, body: bytes) -> bytes | None:
        figures = self._session.figures
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        began = time.monotonic()
        for is_last in (False, True):
            try:
                response = self._http.post(path, body, headers)
                answer = bytes(response.read())
                status = response.status_code
            except HTTPConnectionClosed:
                if not is_last:
                    continue  # it had been idle for so long that the server closed it: once more
                why = "the server closed the connection"
            except (OSError, HTTPParseError) as error:
                why = type(error).__name__
            else:
                if status == 200:
                    figures.posted(name, time.monotonic() - began, len(answer))
                    return answer
                why = f"status {status}"
            break
        figures.post_failed(name, time.monotonic() - began, why)
        return None


class Pacer:
    """Sends at a steady pace from those that listen, whatever the server does: a message that
    has to wait for a connection carries the moment at which it was due.

    Args:
        session: of this process.
        per_stream: sends a second for each stream that is open, at random moments (Poisson).
    """

    def __init__(self, session: "Session", per_stream: float) -> None:
        self._session = session
        self._per_stream = per_stream
        self._api = Api(session, connections=PACER_CONNECTIONS)
        self._under_way = Pool(PACER_CONNECTIONS)

    def run(self) -> None:
        session = self._session
        due = time.monotonic()
        while True:
            rate = self._per_stream * session.open
            now = time.monotonic()
            if not rate or session.quiet:
                due = now
                gevent.sleep(0.05)
                continue
            due += session.random.expovariate(rate)
            if due > now:
                gevent.sleep(due - now)
            listener = session.anybody()
            if listener is not None:
                self._under_way.spawn(self._send, listener.seat, due)

    def _send(self, seat: Seat, due: float) -> None:
        with contextlib.suppress(NotSent):  # each attempt is in the figures
            self._api.send(seat, due=due)
