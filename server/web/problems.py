"""Refusals and failures as RFC 9457 problems."""

import math

import msgspec

from protocol.closing import ClosingReason, least_pause
from protocol.frames import closing_event
from protocol.problems import PROBLEMS, ProblemBody, problem_body
from server.web.response import EVENT_STREAM, UNBUFFERED, Headers, Response, jittered

_encode = msgspec.json.Encoder().encode


class Problem(Exception):
    """What the client gets instead of what it asked for.

    Args:
        code: a row of `protocol.problems`.
        detail: a sentence of ours; never the client's words.
        limit: the limit that was passed.
        retry_after: seconds, for a Retry-After header (RFC 9110 §10.2.3).
        headers: further headers.
    """

    def __init__(
        self,
        code: str,
        *,
        detail: str | None = None,
        limit: int | None = None,
        retry_after: float | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status = PROBLEMS[code].status
        self.detail = detail
        self.limit = limit
        self.headers = (*headers,)
        self.retry_after = retry_after
        if self.status == 401:
            self.headers += ((b"www-authenticate", b"Bearer"),)
        if retry_after is not None:
            self.headers += ((b"retry-after", b"%d" % math.ceil(max(retry_after, 1))),)

    def body(self, *, enabled: bool | None = None) -> ProblemBody:
        return problem_body(self.code, detail=self.detail, limit=self.limit, enabled=enabled)


def problem_response(problem: Problem, body: ProblemBody | None = None) -> Response:
    return Response(
        problem.status,
        _encode(body or problem.body()),
        content_type=b"application/problem+json",
        headers=problem.headers,
    )


def closing_response(problem: Problem, reason: ClosingReason, *, retry: int) -> Response:
    """A stream that closes at once, in place of a problem that waiting may mend: an `EventSource`
    gives up for good at any status but 200.

    Args:
        retry: milliseconds that any client stays away before it comes back.
    """
    pause = max(least_pause(reason, retry), math.ceil((problem.retry_after or 0) * 1000))
    return Response(
        200,
        closing_event(reason, retry=jittered(pause)),
        content_type=EVENT_STREAM,
        headers=[UNBUFFERED],
    )
