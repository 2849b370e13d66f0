"""The listening socket. What is set here every accepted connection inherits."""

import socket
import sys

BACKLOG = 4096
"""Connections that wait to be accepted: all of a restarted server's readers come back at once.
The kernel takes the lesser of this and net.core.somaxconn (4096 on Linux)."""

SEND_BUFFER_BYTES = 64 * 1024
"""In the kernel per connection, which doubles it for its own bookkeeping. Left alone it grows
to 4 MB for a reader that stands still; the longest message takes about 100 kB."""

_TCP_USER_TIMEOUT = 18
"""<linux/tcp.h>; macOS has nothing like it."""


def listen(host: str, port: int, *, stall_seconds: float) -> socket.socket:
    """A socket that listens, for workers to inherit and accept on.

    Args:
        host: a name or an address, of IPv4 or IPv6; `::` takes both.
        port: 0 chooses a free one.
        stall_seconds: that written bytes may stay unacknowledged before the kernel ends the
            connection, `Settings.stall_seconds`.

    Raises:
        OSError: the host is unknown, or the port is taken or not ours to use.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        # A restart finds its port while old connections still linger in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        # A message goes out now, not when the last one has been acknowledged.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if sys.platform == "linux":
            # Hypercorn writes under a shield: a reader that takes nothing would hold its task,
            # and at shutdown the whole worker, until TCP gives up after 15 minutes.
            milliseconds = int(stall_seconds * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, milliseconds)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, *, tls: bool = False) -> str:
    """Where this machine reaches the socket: `http://127.0.0.1:8000`."""
    scheme = "https" if tls else "http"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
