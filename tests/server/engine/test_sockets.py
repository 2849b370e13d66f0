import socket
import sys

import pytest

from server.engine.sockets import SEND_BUFFER_BYTES, listen, url_of


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
def test_accepted_connections_inherit_what_the_listening_socket_has():
    with (
        listen("127.0.0.1", 0, stall_seconds=2.5) as sock,
        socket.create_connection(sock.getsockname()),
        sock.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        # The kernel doubles what is asked for, and grows it no more.
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * SEND_BUFFER_BYTES


def test_a_port_that_is_taken_is_refused():
    with listen("127.0.0.1", 0, stall_seconds=1) as sock, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", sock.getsockname()[1], stall_seconds=1)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:{}"),
        ("localhost", "http://{}"),
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
    ],
)
def test_the_url_reaches_the_socket(host, url):
    try:
        sock = listen(host, 0, stall_seconds=1)
    except OSError:
        pytest.skip(f"no {host} here")
    with sock:
        port = sock.getsockname()[1]
        if host != "localhost":
            assert url_of(sock) == url.format(port)
        reached = url_of(sock).removeprefix("http://").rsplit(":", 1)[0].strip("[]")
        socket.create_connection((reached, port), timeout=5).close()
        if host == "::":  # both families
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
