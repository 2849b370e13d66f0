"""Responses: ASGI apps themselves, as small as they come."""

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]
Life = Callable[[], Awaitable[None]]
"""What a stream does until it ends, once all else of its request is forgotten."""

_encode = msgspec.json.Encoder().encode

NO_STORE = (b"cache-control", b"no-store, no-transform")
"""Conversations stay out of every cache, and proxies keep their hands off."""
COMMON = (NO_STORE, (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
EVENT_STREAM = b"text/event-stream"
UNBUFFERED = (b"x-accel-buffering", b"no")
"""nginx passes such a response on as it comes."""


def jittered(milliseconds: int) -> int:
    """Returns once to twice as long, so that many clients do not come back at once."""
    return round(milliseconds * random.uniform(1.0, 2.0))


class Response:
    """A whole response, sent at once."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self, status: int, body: bytes, *, content_type: bytes, headers: Headers = ()
    ) -> None:
        self.status = status
        self.body = body
        self.headers = [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            *COMMON,
            *headers,
        ]

    def __repr__(self) -> str:
        return f"<Response {self.status}>"

    async def __call__(
        self,
        send: Send,
        extra: Headers = (),
        *,
        linger: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Send it.

        Args:
            extra: headers of every response.
            linger: waited for when the client has everything and before the response ends.
        """
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [*self.headers, *extra],
            }
        )
        if linger is None:
            await send({"type": "http.response.body", "body": self.body})
            return
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await linger()
        await send({"type": "http.response.body", "body": b""})


def json_response(value: Any, *, status: int = 200) -> Response:
    return Response(status, _encode(value), content_type=b"application/json")
