"""A small Redis client on Trio: RESP2 by hiredis, pipelines, and nothing behind our back.

It never retries and never reconnects within a call. A pipeline is one write, and its answers
are parsed where they arrive: so a command in it costs microseconds, not a task switch. A few
connections are kept for pipelines; whoever subscribes takes one of its own.
"""

import re
import select
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis
import trio

from protocol.confidential import Secret

Command = tuple[bytes | str | int, ...]
_pack: Any = hiredis.pack_command  # its stub knows tuples of one

MAX_IDLE = 4
"""Connections kept: as many pipelines as the store has under way at once."""
READ_BYTES = 64 * 1024
"""One read of the socket; also what a feed handles without a pause."""

_CODE = re.compile(r"[A-Z]+")


class RedisFailed(Exception):
    """Redis did not do what was asked. Of its words only an error's code is kept."""


class RedisLost(RedisFailed):
    """There is no connection, or it broke, or Redis is still loading."""


class RedisRefused(RedisFailed):
    """Redis answered with an error.

    Attributes:
        code: the error's first word, such as OOM or READONLY.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _refusal(text: str) -> RedisFailed:
    """For hiredis: what stands for an error among the answers. The text may repeat arguments."""
    code = _CODE.match(text)
    word = code[0] if code else "ERR"
    return RedisLost() if word in ("LOADING", "NOAUTH") else RedisRefused(word)


class Connection:
    """One connection. One task may write while another one reads."""

    def __init__(self, stream: trio.abc.Stream, sock: trio.socket.SocketType) -> None:
        self._stream = stream
        self._socket = sock
        self._parser = hiredis.Reader(
            replyError=_refusal, protocolError=_refusal, notEnoughData=_MORE
        )
        self._writing = trio.Lock()

    @property
    def dead(self) -> bool:
        """Whether an idle one was closed by the peer, or has something to say unasked."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def send(self, commands: Sequence[Command]) -> None:
        """Raises:
        RedisLost
        """
        data = b"".join([_pack(command) for command in commands])
        try:
            async with self._writing:
                await self._stream.send_all(data)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise RedisLost from None

    async def receive(self) -> list[Any]:
        """The answers that one read of the socket completes: none, one or many. An error among
        them is a `RedisFailed`, not raised.

        Raises:
            RedisLost
        """
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise RedisLost from None
        if not data:
            raise RedisLost
        parser = self._parser
        try:
            parser.feed(bytes(data))
            answers = []
            while (answer := parser.gets(False)) is not _MORE:
                answers.append(answer)
        except RedisFailed:  # it does not speak RESP
            raise RedisLost from None
        return answers

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The answer to each command, in order. An error is a `RedisFailed`, not raised.

        Raises:
            RedisLost
        """
        await self.send(commands)
        answers = await self.receive()
        while len(answers) < len(commands):
            answers += await self.receive()
        return answers

    def close(self) -> None:
        """At once, without goodbye. Plain."""
        self._socket.close()


_MORE = object()


class Client:
    """Opens connections to one Redis, and keeps a few for pipelines.

    Args:
        url: `redis://` or `rediss://` with user, password, host, port and number of the
            database; `ssl_cert_reqs=none` and `ssl_ca_certs` of redis-py are understood.
    """

    def __init__(self, url: Secret) -> None:
        parts = urlsplit(url.reveal())
        query = parse_qs(parts.query)
        self._host = parts.hostname or "localhost"
        self._port = parts.port or 6379
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "rediss":
            self._tls = ssl.create_default_context(cafile=query.get("ssl_ca_certs", [None])[0])
            if query.get("ssl_cert_reqs") == ["none"]:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        self._greeting: list[Command] = []
        if parts.password:
            user = (unquote(parts.username),) if parts.username else ()
            self._greeting.append(("AUTH", *user, unquote(parts.password)))
        database = parts.path.strip("/") or query.get("db", [""])[0]
        if database.isdigit() and int(database):
            self._greeting.append(("SELECT", int(database)))
        # Last: who may not name the connection may still use it.
        self._greeting.append(("CLIENT", "SETNAME", "sottovoce"))
        self._idle: list[Connection] = []

    async def connect(self) -> Connection:
        """A new connection, let in. The caller limits the time, and closes it.

        Raises:
            RedisLost: nobody listens, or we are not let in.
        """
        try:
            tcp = await trio.open_tcp_stream(self._host, self._port)
        except OSError:
            raise RedisLost from None
        stream: trio.abc.Stream = tcp
        if self._tls is not None:
            stream = trio.SSLStream(tcp, self._tls, server_hostname=self._host)
        connection = Connection(stream, tcp.socket)
        try:
            *needed, _ = await connection.call(self._greeting)
            if any(isinstance(answer, RedisFailed) for answer in needed):
                raise RedisLost
        except BaseException:
            connection.close()
            raise
        return connection

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """One pipeline: the answer to each command. The caller limits the time; a call that is
        cancelled closes its connection, so no answer can meet another question.

        Raises:
            RedisLost: some of it may have been done.
            RedisRefused: one of the commands; the others may have been done.
        """
        connection = None
        while connection is None and self._idle:
            connection = self._idle.pop()
            if connection.dead:
                connection.close()
                connection = None
        connection = connection or await self.connect()
        answered = False
        try:
            answers = await connection.call(commands)
            answered = True
        finally:
            if answered and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
        for answer in answers:
            if isinstance(answer, RedisFailed):
                raise answer
        return answers

    def close(self) -> None:
        """Close what is idle. Plain."""
        while self._idle:
            self._idle.pop().close()
