"""Refusals and failures as RFC 9457 problems."""

import math

import msgspec

from protocol.problems import PROBLEMS, ProblemBody, problem_body
from server.web.response import Headers, Response

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
