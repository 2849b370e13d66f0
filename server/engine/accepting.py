"""Taking connections: several in a turn of the loop, where several wait.

Trio's listener has a turn for each. A turn of a busy worker takes 10 ms, and so 100 connections
a second would be all that it takes, while those who wait for it grow more.
"""

import trio

ACCEPT_TOGETHER = 8
"""Then others have their turn: to begin a connection takes up to half a ms."""

_one_a_turn = trio.SocketListener.accept


def install_accepting() -> None:
    """Have the listeners of this process accept so."""
    together = 0

    async def accept(listener: trio.SocketListener) -> trio.SocketStream:
        nonlocal together
        together += 1
        if together % ACCEPT_TOGETHER:
            try:
                # Trio's own socket has no plain `accept`.
                sock, _ = listener.socket._sock.accept()  # type: ignore[attr-defined]
                return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            except OSError:  # nobody waits; whatever else it is, Trio's own meets it too
                pass
        return await _one_a_turn(listener)

    trio.SocketListener.accept = accept  # type: ignore[assignment, method-assign]
