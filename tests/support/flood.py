"""Many connections that mean no good, in a process of their own.

    python -m tests.support.flood PORT COUNT [--rate 1000] [--source 127.0.0.2] [--small]
                                  [--drip SECONDS]

Standard input's first line is JSON: what the connections send first, in turn (latin-1). `--rate`
of them are opened a second. Each is held, and nothing is read from it until it ends; with
`--drip` it sends one more byte every so often, not all at the same moment. A JSON line says when
all have been opened, and how many are open then. At the end of standard input a last one says
how many the server has ended, how long it held one at most, and with which statuses.
"""

import argparse
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
SMALL_BYTES = 4096
"""A receive buffer that is full soon."""
_BIND_ADDRESS_NO_PORT = 24
"""<linux/in.h>: else each `bind` looks for a port that nobody has from this address."""


class Flood:
    """The process, as a test sees it.

    Attributes:
        opened: how many connections were open at the same time, when all were.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.opened = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_open(self) -> None:
        self.opened = self._line()["open"]

    def finish(self) -> dict[str, Any]:
        """Read what was answered, and leave: `ended`, `statuses`, `longest`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line: dict[str, Any] = json.loads(self._process.stdout.readline())
        return line


@contextmanager
def flood(port: int, count: int, *options: str, sent: Sequence[str] = ("",)) -> Iterator[Flood]:
    """`count` connections while the block lasts, from when `wait_open` returns."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.flood", str(port), str(count), *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(list(sent)) + "\n")
        process.stdin.flush()
        yield Flood(process)
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.since = self.sent = time.monotonic()


class _Connections:
    """The process itself."""

    def __init__(self, *, small: bool) -> None:
        self._small = small
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self.ended = 0
        self.longest = 0.0
        self.statuses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, address: tuple[str, int], source: str, first: bytes) -> None:
        sock = socket.socket()
        if self._small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
        sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        sock.settimeout(10)
        try:
            sock.connect(address)
            sock.sendall(first)
        except OSError:
            sock.close()
            self.ended += 1
            return
        sock.setblocking(False)
        self._open[sock.fileno()] = _Connection(sock)
        self._poll.register(sock, select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR)

    def notice_ends(self, seconds: float) -> None:
        """Wait for connections that the server ends, and take their answers."""
        for fd, _ in self._poll.poll(seconds, 4096):
            self._finish(fd, ended=True)

    def drip(self, every: float) -> None:
        """A byte on each connection that has sent none for so long."""
        now = time.monotonic()
        while self._open:
            fd, connection = next(iter(self._open.items()))
            if now < connection.sent + every:
                return
            connection.sent = now
            self._open[fd] = self._open.pop(fd)  # to the end
            try:
                connection.sock.send(b"a")
            except OSError:
                self._finish(fd, ended=True)

    def leave(self) -> None:
        for fd in list(self._open):
            self._finish(fd, ended=False)

    def _finish(self, fd: int, *, ended: bool) -> None:
        connection = self._open.pop(fd)
        self._poll.unregister(fd)
        if ended:
            self.ended += 1
            self.longest = max(self.longest, time.monotonic() - connection.since)
        with suppress(OSError):
            if head := connection.sock.recv(65536):
                self.statuses[head.split(b" ", 2)[1].decode()] += 1
        connection.sock.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--source", default="127.0.0.2")
    parser.add_argument("--drip", type=float, default=0.0)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.nice(15)  # attackers have machines of their own: they should not take ours from the server
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    first = [text.encode("latin-1") for text in json.loads(sys.stdin.readline())]
    connections = _Connections(small=options.small)
    address = ("127.0.0.1", options.port)
    began = time.monotonic()
    told, number = False, 0
    while True:
        due = min(options.count, int((time.monotonic() - began) * options.rate))
        while number < due:
            connections.open(address, options.source, first[number % len(first)])
            number += 1
        if number == options.count and not told:
            print(json.dumps({"open": len(connections)}), flush=True)
            told = True
        connections.notice_ends(0.01)
        if options.drip:
            connections.drip(options.drip)
        if told and select.select([sys.stdin], [], [], 0)[0]:
            break
    connections.leave()
    about = {"ended": connections.ended, "longest": round(connections.longest, 2)}
    print(json.dumps({**about, "statuses": connections.statuses}), flush=True)


if __name__ == "__main__":
    main()
