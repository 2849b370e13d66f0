"""Hypercorn's HTTP/2, in which an early answer costs nobody their connection.

Who is answered before all of the body has come, a 401 or a 413, still sends the rest. Hypercorn
0.18 looks for the stream of those bytes, finds none and breaks the connection, with every other
stream on it: behind a proxy those are other people's. Here such bytes are dropped; the client's
END_STREAM, the flow control or the idle time ends them.
"""

from typing import Any

import hypercorn.protocol
from hypercorn.protocol.h2 import H2Protocol


class _Answered:
    """Stands for a stream that is over."""

    async def handle(self, event: Any) -> None:
        pass


class _Streams(dict[int, Any]):
    """A connection's streams by number."""

    def __missing__(self, number: int) -> _Answered:
        return _Answered()


class PatientH2(H2Protocol):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = _Streams()


def install_http2() -> None:
    """Have Hypercorn's connections of this process use `PatientH2`."""
    hypercorn.protocol.H2Protocol = PatientH2  # type: ignore[attr-defined, assignment]
