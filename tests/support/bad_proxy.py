"""A reverse proxy that breaks one thing, as proxies do."""

import gzip
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Habit = Literal[
    "none",
    "buffers",
    "compresses",
    "changes Cache-Control",
    "ends what is silent",
    "drops Last-Event-ID",
    "drops Cookie",
    "drops Authorization",
    "rewrites Host",
    "passes everything",
    "answers by itself",
]

SILENT_SECONDS = 3.0
BUFFER_BYTES = 64 * 1024
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@contextmanager
def bad_proxy(upstream: str, habit: Habit) -> Iterator[str]:
    """Its URL. It passes /api/chat/ to a server on this machine, and does that one thing."""

    class Handler(BaseHTTPRequestHandler):
        def relay(self) -> None:
            self.close_connection = True
            if (
                not self.path.startswith("/api/chat/") and habit != "passes everything"
            ) or habit == "answers by itself":
                self.send_error(404)
            else:
                with suppress(OSError, http.client.HTTPException):
                    self.pass_on()

        do_GET = do_POST = relay  # noqa: N815

        def pass_on(self) -> None:
            dropped = {habit.removeprefix("drops ").lower()} | HOP_BY_HOP
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in dropped
            }
            address = urlsplit(upstream).netloc
            if habit == "rewrites Host":
                headers["Host"] = address
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            timeout = SILENT_SECONDS if habit == "ends what is silent" else 60
            connection = http.client.HTTPConnection(address, timeout=timeout)
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            streams = answer.headers.get_content_type() == "text/event-stream"
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() == "cache-control" and habit == "changes Cache-Control":
                    self.send_header(name, "no-cache")
                elif name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            if streams and habit == "compresses":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            held = b""
            while data := answer.read1(BUFFER_BYTES):
                held += data
                if streams and habit == "buffers" and len(held) < BUFFER_BYTES:
                    continue
                compressed = streams and habit == "compresses"
                self.wfile.write(gzip.compress(held) if compressed else held)
                held = b""
            connection.close()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that leaves

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)
