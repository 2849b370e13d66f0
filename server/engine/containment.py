"""Hypercorn's connections, each of which fails alone.

Hypercorn lets an exception of its protocols out of the connection, and so out of the worker: one
request with a malformed `HTTP2-Settings` ends every stream. Here it ends that connection.
"""

import hypercorn.trio.run
import structlog
from hypercorn.trio.tcp_server import TCPServer

from storage.failures import describe

log = structlog.get_logger("worker")


class ContainedConnection(TCPServer):
    """Hypercorn's connection; what breaks it is logged by its kind and place alone."""

    async def run(self) -> None:
        try:
            await super().run()
        except* Exception as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            log.warning("connection_failed", **describe(error))


def contain_connections() -> None:
    """Have Hypercorn's workers of this process use `ContainedConnection`."""
    hypercorn.trio.run.TCPServer = ContainedConnection  # type: ignore[attr-defined]
