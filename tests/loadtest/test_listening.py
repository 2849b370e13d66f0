"""The client of streams against a forged server: it resumes, and notices what is wrong."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loadtest.local import ROOT

RUN_SECONDS = 30
PATIENCE_SECONDS = 15.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(*events: str) -> bytes:
    data = "".join(f"{event}\n\n" for event in events).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


CONNECTED = 'retry: 10\ndata: {"type":"connected","channelId":7,"timestamp":1}'


def message(seq: int, channel: int = 7) -> str:
    return f'id: {seq}\ndata: {{"id":"x","text":"hm","channelId":{channel}}}'


def closing(*, reconnect: bool) -> str:
    told = json.dumps({"reason": "drain", "reconnect": reconnect})
    return f"event: closing\ndata: {told}"


END = b"0\r\n\r\n"
FORGED = [
    HEAD + chunk(CONNECTED, message(1)) + chunk(message(1), message(3), message(2), message(9, 8)),
    HEAD + chunk(CONNECTED) + chunk("event: reset\nid:\ndata: {}", message(9)) + END,
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    HEAD + chunk(CONNECTED),  # and silence
    HEAD + chunk(CONNECTED, message(10), closing(reconnect=False)) + END,
]
SILENT = 3


class Forger(threading.Thread):
    """Answers one connection after the other.

    Attributes:
        cursors: the Last-Event-ID of each request.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cursors: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_SECONDS)
        self.port: int = self._listener.getsockname()[1]

    def run(self) -> None:
        with self._listener:
            for number, answer in enumerate(FORGED):
                sock, _ = self._listener.accept()
                with sock:
                    sock.settimeout(PATIENCE_SECONDS)
                    asked = b""
                    while b"\r\n\r\n" not in asked:
                        asked += sock.recv(4096)
                    found = re.search(rb"Last-Event-ID: (\S*)", asked)
                    self.cursors.append(found[1].decode() if found else "")
                    sock.sendall(answer)
                    try:
                        while number == SILENT and sock.recv(4096):
                            pass
                    except ConnectionError:
                        pass  # the client has given up


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> tuple[dict, list[str]]:
    tokens: Path = tmp_path_factory.mktemp("people") / "tokens"
    line = {"channel_id": 7, "therapist_token": "t", "prospect_token": "p"}
    tokens.write_text(json.dumps(line) + "\n")
    forger = Forger()
    forger.start()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.loadtest.listen", f"http://127.0.0.1:{forger.port}", tokens],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    forger.join(PATIENCE_SECONDS)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), forger.cursors


def test_each_connection_resumes_after_the_last_message(heard):
    assert heard[1] == ["", "3", "9", "9", "9"]


def test_everything_that_is_wrong_is_noticed_and_named(heard):
    assert heard[0]["failures"] == [
        "duplicate: a message was shown twice",
        "gap: messages were left out",
        "reordering: a message came after a later one",
        "leak: a message of another channel",
        "connect: status 503",
        "lost heartbeat: an open stream was silent for two heartbeats",
    ]


def test_it_is_counted(heard):
    tally = heard[0]["tally"]
    counted = {name: count for name, count in tally.items() if count}
    assert counted == {
        "connects": 5, "connect_failures": 1, "reconnects": 3, "ended_by_server": 3, "shown": 6,
        "duplicates": 1, "gaps": 1, "reorderings": 1, "leaks": 1, "resets": 1,
        "lost_heartbeats": 1,
    }  # fmt: skip


def test_it_stays_away_when_it_is_told_to(heard):
    assert heard[0]["ended"]
    assert heard[0]["open"] == 0
