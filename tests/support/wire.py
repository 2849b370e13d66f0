"""What this run's servers and clients speak: one of four paths, by the variable TEST_PATH.

    ours    HTTP/1.1, by our engine; the default
    stock   HTTP/1.1, by stock Hypercorn's
    tls     HTTP/1.1 over TLS
    h2      HTTP/2 over TLS

Everything that starts a server or connects to one asks `WIRE` how. A test that only makes sense
in HTTP/1.1 has the mark `http1` and is left out on `h2`; one that is about our engine, or long and
the same whatever is spoken, has `once` and runs on `ours` alone.
"""

import atexit
import datetime
import functools
import ipaddress
import os
import shutil
import socket
import ssl
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h11
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.engine.options import EngineOptions

PATHS = ("ours", "stock", "tls", "h2")

Headers = Iterable[tuple[str, str]]


class Broken(Exception):
    """The connection ended, or made no sense, before the answer was whole."""


class Head(NamedTuple):
    status: int
    headers: list[tuple[str, str]]


class End:
    """The answer is whole."""


class Http(Protocol):
    """One connection's HTTP, without the connection: a request at a time."""

    @property
    def reusable(self) -> bool:
        """The last answer is whole, and another request may follow."""

    def request(self, method: str, target: str, headers: Headers, body: bytes = b"") -> bytes:
        """What to write. A body is one write's worth, 16 kB at most."""

    def receive(self, data: bytes | bytearray) -> bytes:
        """Take what was read, b"" for the end; what to write in return.

        Raises:
            Broken
        """

    def next(self) -> Head | bytes | End | None:
        """The next part of the answer; None: read on.

        Raises:
            Broken
        """


class Http1:
    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT)

    def request(self, method: str, target: str, headers: Headers, body: bytes = b"") -> bytes:
        if self._h11.our_state is h11.DONE:
            self._h11.start_next_cycle()
        fields = [*headers, *([("content-length", str(len(body)))] if body else [])]
        events = [h11.Request(method=method, target=target, headers=fields)]
        parts = [*events, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        return b"".join(self._h11.send(part) or b"" for part in parts)

    def receive(self, data: bytes | bytearray) -> bytes:
        try:
            self._h11.receive_data(bytes(data))
        except (RuntimeError, h11.RemoteProtocolError):
            raise Broken from None
        return b""

    def next(self) -> Head | bytes | End | None:
        try:
            event = self._h11.next_event()
        except h11.RemoteProtocolError:
            raise Broken from None
        match event:
            case h11.Response():
                fields = [(name.decode(), value.decode()) for name, value in event.headers]
                return Head(event.status_code, fields)
            case h11.Data():
                return bytes(event.data)
            case h11.EndOfMessage():
                return End()
            case h11.ConnectionClosed():
                raise Broken
        return None

    @property
    def reusable(self) -> bool:
        return self._h11.our_state is self._h11.their_state is h11.DONE


class Http2:
    def __init__(self) -> None:
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._stream = 0
        self._parts: deque[Head | bytes | End] = deque()
        self._lost = False
        self.reusable = False

    def request(self, method: str, target: str, headers: Headers, body: bytes = b"") -> bytes:
        fields = {name.lower(): value for name, value in headers}
        authority = fields.pop("host")
        pseudo = {":method": method, ":scheme": "https", ":authority": authority, ":path": target}
        self.reusable = False
        self._stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(self._stream, [*pseudo.items(), *fields.items()], not body)
        if body:
            self._h2.send_data(self._stream, body, end_stream=True)
        return self._h2.data_to_send()

    def receive(self, data: bytes | bytearray) -> bytes:
        self._lost = self._lost or not data
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            raise Broken from None
        for event in events:
            self._take(event)
        return self._h2.data_to_send()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived(stream_id=self._stream):
                fields = [(_text(name), _text(value)) for name, value in event.headers]
                status = next(int(value) for name, value in fields if name == ":status")
                self._parts.append(Head(status, [f for f in fields if f[0][0] != ":"]))
            case h2.events.DataReceived(stream_id=self._stream):
                self._parts.append(event.data)
                length = event.flow_controlled_length
                self._h2.acknowledge_received_data(length, self._stream)
            case h2.events.StreamEnded(stream_id=self._stream):
                self._parts.append(End())
            case h2.events.StreamReset(stream_id=self._stream) | h2.events.ConnectionTerminated():
                self._lost = True

    def next(self) -> Head | bytes | End | None:
        if self._parts:
            part = self._parts.popleft()
            self.reusable = isinstance(part, End) and not self._lost
            return part
        if self._lost:
            raise Broken
        return None


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


class Wire:
    """One of the four.

    Attributes:
        scheme: of URLs.
    """

    def __init__(self, path: str) -> None:
        if path not in PATHS:
            raise ValueError(f"TEST_PATH is one of {', '.join(PATHS)}")
        self.path: Final = path
        self.http2: Final = path == "h2"
        self.tls: Final = path in ("tls", "h2")
        self.scheme: Final = "https" if self.tls else "http"

    # Servers

    @property
    def options(self) -> EngineOptions:
        """Of a server's workers."""
        if self.tls:
            certfile, keyfile = certificate()
            return EngineOptions(certfile=certfile, keyfile=keyfile)
        return EngineOptions(engine="stock" if self.path == "stock" else "ours")

    # Clients

    @property
    def client(self) -> dict[str, Any]:
        """`httpx.Client`'s options, and `AsyncClient`'s."""
        return {
            "trust_env": False,
            "verify": self._httpx_context,
            "http1": not self.http2,
            "http2": self.http2,
        }

    @property
    def environ(self) -> dict[str, str]:
        """Of processes that are clients: whom they trust."""
        if not self.tls:
            return {}
        certfile = str(certificate()[0])
        return {"SSL_CERT_FILE": certfile, "NODE_EXTRA_CA_CERTS": certfile}

    def connect(self, port: int, *, timeout: float) -> socket.socket:
        """A connection to this machine, which blocks."""
        sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        if not self.tls:
            return sock
        try:
            return self._context.wrap_socket(sock, server_hostname="127.0.0.1")
        except BaseException:
            sock.close()
            raise

    async def open(self, host: str, port: int) -> "trio.SocketStream | Tls":
        """A connection for Trio.

        Raises:
            OSError, trio.BrokenResourceError
        """
        stream = await trio.open_tcp_stream(host, port)
        if not self.tls:
            return stream
        secured = trio.SSLStream(stream, self._context, server_hostname=host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured

    def http(self) -> Http:
        return Http2() if self.http2 else Http1()

    @functools.cached_property
    def _httpx_context(self) -> ssl.SSLContext:
        """Of its own: httpx sets the ALPN by itself. Without TLS too, as each client would read all
        the authorities of this machine, 30 ms."""
        if self.tls:
            return ssl.create_default_context(cafile=certificate()[0])
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=certificate()[0])
        context.set_alpn_protocols(["h2" if self.http2 else "http/1.1"])
        return context


Tls = trio.SSLStream[trio.SocketStream]


def socket_of(stream: "trio.SocketStream | Tls") -> trio.socket.SocketType:
    return (
        stream.socket if isinstance(stream, trio.SocketStream) else stream.transport_stream.socket
    )


@functools.cache
def certificate() -> tuple[Path, Path]:
    """Of 127.0.0.1, by itself, for a day: (certificate, key). They go away with this process."""
    folder = Path(tempfile.mkdtemp(prefix="sottovoce-tls-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sottovoce tests")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    certfile, keyfile = folder / "certificate.pem", folder / "key.pem"
    certfile.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    keyfile.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certfile, keyfile


WIRE = Wire(os.environ.get("TEST_PATH", "ours"))
