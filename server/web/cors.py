"""Cross-origin requests, for the configured origins only (Fetch Standard §3.3)."""

from collections.abc import Sequence

from server.web.request import Request, origin_header
from server.web.response import Headers, Response

MAX_AGE_SECONDS = 600
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "Cache-Control",
    "X-Requested-With",
)
"""The headers that a page may send. The last two say nothing to us: polyfills of `EventSource` and
older libraries add them to every request, and would fail at the preflight without."""


def cors_headers(request: Request, allowed: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """The headers that let a configured origin read the answer; none for any other."""
    origin = origin_header(request)
    if origin is None or origin not in allowed:
        return [(b"vary", b"Origin")] if allowed else []
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"X-Request-Id, Retry-After, Content-Disposition"),
        (b"vary", b"Origin"),
    ]


def preflight(methods: Sequence[str], cors: Headers, *, allowed_headers: Sequence[str]) -> Response:
    """The answer to OPTIONS: what the path takes.

    Args:
        allowed_headers: names that a page may send besides `REQUEST_HEADERS`.
    """
    allow = ", ".join(methods).encode()
    response = Response(204, b"", content_type=b"text/plain")
    response.headers = [
        (b"allow", allow),
        (b"access-control-allow-methods", allow),
        (
            b"access-control-allow-headers",
            ", ".join([*REQUEST_HEADERS, *allowed_headers]).encode("ascii"),
        ),
        (b"access-control-max-age", b"%d" % MAX_AGE_SECONDS),
        *cors,
    ]
    return response
