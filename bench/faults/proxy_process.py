"""A proxy in a process of its own: `python -m bench.faults.proxy_process HOST PORT`.

All that the servers say to PostgreSQL and Valkey goes through proxies. In the campaign's process,
beside its hundreds of clients, they were as slow as it was busy: for seconds no connection to
PostgreSQL could be made in the second that it may take, and nothing was broken any more.
"""

import functools
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import trio

from bench.faults.proxy import TcpProxy, open_proxy
from bench.subjects import ROOT

ANSWER_SECONDS = 5.0
"""For what takes a millisecond, however busy the machine is."""
START_SECONDS = 20.0
STOP_SECONDS = 5.0


def _setting(name: str) -> Any:
    def get(self: "ProxyProcess") -> Any:
        return self._settings[name]

    def put(self: "ProxyProcess", value: Any) -> None:
        self._settings[name] = value
        self._tell("set", name, value)

    return property(get, put)


class ProxyProcess:
    """Does what `TcpProxy` does. All of it is plain, and has taken effect when it returns.

    Args:
        link: the process at its other end has said its port, or is about to.

    Raises:
        OSError: it does not answer.
    """

    delay = _setting("delay")
    piece = _setting("piece")
    target = _setting("target")

    def __init__(self, link: socket.socket, target_host: str, target_port: int) -> None:
        self._link = link
        self._settings = {"delay": 0.0, "piece": None, "target": (target_host, target_port)}
        self._answers = link.makefile("rb")
        link.settimeout(START_SECONDS)
        try:
            self.port = int(self._answer())
        except BaseException:
            self.close()
            raise
        link.settimeout(ANSWER_SECONDS)

    def cut(self) -> None:
        self._tell("cut")

    def stall(self) -> None:
        self._tell("stall")

    def resume(self) -> None:
        self._tell("resume")

    def close(self) -> None:
        """Let the link go; what was told stays as it is."""
        self._answers.close()

    def _tell(self, *words: Any) -> None:
        self._link.sendall(msgspec.json.encode(words) + b"\n")
        self._answer()

    def _answer(self) -> bytes:
        if not (answer := self._answers.readline()):
            raise ConnectionError("a proxy has ended")
        return answer


@asynccontextmanager
async def open_proxy_process(target_host: str, target_port: int) -> AsyncIterator[ProxyProcess]:
    """A proxy on a free port, which ends with the block, or with this process."""
    ours, its = socket.socketpair()
    with ours:
        with its:
            command = [sys.executable, "-m", __name__, target_host, str(target_port)]
            process = await trio.lowlevel.open_process(command, stdin=its, stdout=its, cwd=ROOT)
        try:
            start = functools.partial(ProxyProcess, ours, target_host, target_port)
            proxy = await trio.to_thread.run_sync(start)
            try:
                yield proxy
            finally:
                proxy.close()
        finally:
            with suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            with trio.move_on_after(STOP_SECONDS, shield=True) as scope:
                await process.wait()
            if scope.cancelled_caught:
                process.kill()


async def _obey(proxy: TcpProxy, link: trio.SocketStream) -> None:
    """What comes in lines, until the other end has gone."""
    asked = b""
    async for data in link:
        asked += data
        while b"\n" in asked:
            line, _, asked = asked.partition(b"\n")
            match msgspec.json.decode(line):
                case ["cut"]:
                    proxy.cut()
                case ["stall"]:
                    proxy.stall()
                case ["resume"]:
                    proxy.resume()
                case ["set", "delay", delay]:
                    proxy.delay = delay
                case ["set", "piece", piece]:
                    proxy.piece = piece
                case ["set", "target", [host, port]]:
                    proxy.target = (host, port)
                case other:
                    raise ValueError(other)
            await link.send_all(b"done\n")


async def _main(target_host: str, target_port: int) -> None:
    link = trio.SocketStream(trio.socket.fromfd(0, socket.AF_UNIX, socket.SOCK_STREAM))
    with suppress(trio.BrokenResourceError):
        async with open_proxy(target_host, target_port) as proxy:
            await link.send_all(b"%d\n" % proxy.port)
            await _obey(proxy, link)


if __name__ == "__main__":
    trio.run(_main, sys.argv[1], int(sys.argv[2]))
