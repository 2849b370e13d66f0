"""The same limit from Python: a broadcast that does nothing but call `send`.

    python write_loop.py PORT

GET: a reader. POST: every reader gets the same ready chunk, then the POST its answer.
"""

import select
import socket
import sys
from contextlib import suppress

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"69\r\ndata: ~" + b"0123456789" * 9 + b"012345\n\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"


def main() -> None:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    askers: dict[int, socket.socket] = {}
    readers: list[socket.socket] = []
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while True:
        for fd, _ in waiting.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                askers[sock.fileno()] = sock
                waiting.register(sock, select.POLLIN)
                continue
            sock = askers[fd]
            request = b""
            with suppress(OSError):
                request = sock.recv(8192)
            if request.startswith(b"P"):
                for reader in readers:
                    with suppress(OSError):  # it has left
                        reader.send(EVENT)
                sock.sendall(ANSWER)
                continue
            waiting.unregister(sock)
            del askers[fd]
            if request:
                sock.sendall(HEAD)
                readers.append(sock)


if __name__ == "__main__":
    main()
