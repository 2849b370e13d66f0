"""The whole surface on one screen."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from server.handlers import availability, export, health, messaging, openapi, send, stream, ticket
from server.service import Service
from server.web.request import Request
from server.web.response import Headers, Life, Send


class Answer(Protocol):
    """A response: an ASGI app that knows its request already.

    Returns:
        None; or, for a stream that has begun, what it does until it ends. That is run when
        nothing is left of the request.
    """

    async def __call__(self, send: Send, extra: Headers = ()) -> Life | None: ...


Handler = Callable[[Service, Request], Awaitable[Answer]]


class Route(msgspec.Struct, frozen=True):
    name: str
    """In logs, metrics and the audit trail."""
    method: str
    path: str
    handler: Handler


STREAM = Route("stream", "GET", "/api/chat/{channelId}", stream.open_stream)
ROUTES = (
    STREAM,
    Route("send", "POST", "/api/chat/send", send.send),
    Route("messaging", "POST", "/api/chat/messaging", messaging.messaging),
    Route("export", "GET", "/api/chat/export", export.export),
    Route("availability", "GET", "/api/chat/availability", availability.availability),
    Route("ticket", "POST", "/api/chat/ticket", ticket.issue_ticket),
    Route("healthz", "GET", "/healthz", health.healthz),
    Route("readyz", "GET", "/readyz", health.readyz),
    Route("metrics", "GET", "/metrics", health.metrics),
    Route("openapi", "GET", "/openapi.json", openapi.openapi),
)

CHAT_PREFIX = "/api/chat/"
"""What is switched by the flag, refused in the audit trail, and open to configured origins."""

_BY_PATH = {route.path: route for route in ROUTES if route is not STREAM}


def find(path: str) -> tuple[Route, int | None] | None:
    """The route of a path, and the channel's number in it; None for an unknown path.

    One trailing slash changes nothing: Next.js adds it where `trailingSlash` is set, and a
    redirect would cost a POST its body. A number is written one way only: no sign, no leading zero,
    no other digits than ASCII's.
    """
    path = path.removesuffix("/")
    if (route := _BY_PATH.get(path)) is not None:
        return route, None
    number = path.removeprefix(CHAT_PREFIX)
    if (
        number is not path
        and len(number) <= 19
        and number.isascii()
        and number.isdigit()
        and number[0] != "0"
        and int(number) < 2**63
    ):
        return STREAM, int(number)
    return None
