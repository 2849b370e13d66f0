"""Real sockets, of which several wait."""

import socket

import pytest
import trio
import trio.testing

from server.engine.accepting import ACCEPT_TOGETHER, install_accepting
from server.engine.sockets import listen


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.SocketListener, "accept", trio.SocketListener.accept)
    install_accepting()


@pytest.mark.usefixtures("_installed")
async def test_who_waits_together_is_accepted_in_one_turn_and_then_others_have_theirs():
    async with trio.SocketListener(
        trio.socket.from_stdlib_socket(listen("127.0.0.1", 0, stall_seconds=20))
    ) as listener:
        peers = [
            socket.create_connection(listener.socket.getsockname())
            for _ in range(2 * ACCEPT_TOGETHER - 1)
        ]
        accepted = []
        with trio.testing.assert_no_checkpoints():
            accepted += [await listener.accept() for _ in range(ACCEPT_TOGETHER - 1)]
        with trio.testing.assert_checkpoints():
            accepted.append(await listener.accept())
        with trio.testing.assert_no_checkpoints():
            accepted += [await listener.accept() for _ in range(ACCEPT_TOGETHER - 1)]
        for peer, stream in zip(peers, accepted, strict=True):
            assert stream.socket.getpeername() == peer.getsockname()
            peer.close()
            assert await stream.receive_some() == b""
            await stream.aclose()


@pytest.mark.usefixtures("_installed")
async def test_who_comes_later_is_waited_for_and_a_closed_listener_says_so():
    listener = trio.SocketListener(
        trio.socket.from_stdlib_socket(listen("127.0.0.1", 0, stall_seconds=20))
    )
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def accept() -> None:
            await trio.aclose_forcefully(await listener.accept())

        await trio.testing.wait_all_tasks_blocked()
        socket.create_connection(listener.socket.getsockname()).close()
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
