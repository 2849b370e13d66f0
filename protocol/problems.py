"""What can go wrong, as one table: code, status and sentence (RFC 9457 problem details).

The sentence is fixed for each code. A problem repeats nothing that the client sent.
"""

from typing import NamedTuple

from protocol.confidential import Confidential

UPGRADE_URL = "/billing"


class ProblemKind(NamedTuple):
    status: int
    sentence: str


PROBLEMS: dict[str, ProblemKind] = {
    # Who you are
    "UNAUTHENTICATED": ProblemKind(401, "A valid session token is needed"),
    "TOKEN_EXPIRED": ProblemKind(401, "The session token has expired"),
    "TOKEN_IN_URL": ProblemKind(401, "A session token in a URL is refused"),
    "ORIGIN_REFUSED": ProblemKind(403, "This origin may not send with a cookie"),
    "USER_NOT_FOUND": ProblemKind(404, "User not found"),
    "USER_INACTIVE": ProblemKind(403, "This account is not active"),
    # What is yours
    "NOT_YOUR_CHANNEL": ProblemKind(403, "You do not have access to this channel"),
    "SUBSCRIPTION_REQUIRED": ProblemKind(403, "An active subscription is required"),
    "CHANNEL_BLOCKED": ProblemKind(403, "This channel is blocked"),
    "CHANNEL_ARCHIVED": ProblemKind(403, "This channel is archived and takes no new messages"),
    "THERAPIST_ONLY": ProblemKind(403, "Only the channel's therapist may do this"),
    "MESSAGE_NOT_FOUND": ProblemKind(404, "No such message in this channel"),
    # What you sent
    "NOT_FOUND": ProblemKind(404, "Not found"),
    "METHOD_NOT_ALLOWED": ProblemKind(405, "This method is not allowed here"),
    "UNSUPPORTED_MEDIA_TYPE": ProblemKind(415, "The body must be application/json"),
    "BODY_TOO_LARGE": ProblemKind(413, "The body is too large"),
    "INVALID_JSON": ProblemKind(400, "The body is not valid JSON"),
    "INVALID_BODY": ProblemKind(400, "The body does not have the fields that are expected"),
    "INVALID_QUERY": ProblemKind(400, "A query parameter is missing or not of its type"),
    "INVALID_CURSOR": ProblemKind(400, "The last event id is not one that a server gives"),
    "EMPTY_MESSAGE": ProblemKind(400, "The message has no text"),
    "MESSAGE_TOO_LONG": ProblemKind(400, "The message is too long"),
    "INVALID_TEXT": ProblemKind(400, "The text has a character that cannot be stored"),
    "IDEMPOTENCY_CONFLICT": ProblemKind(409, "This client message id was used for another message"),
    "REQUEST_TIMEOUT": ProblemKind(408, "The request did not arrive in time"),
    # What is no HTTP that we speak
    "BAD_REQUEST": ProblemKind(400, "The request is not valid HTTP"),
    "URI_TOO_LONG": ProblemKind(414, "The request's target is too long"),
    "HEADERS_TOO_LARGE": ProblemKind(431, "The request's headers are too large or too many"),
    "METHOD_UNKNOWN": ProblemKind(501, "This method is not known here"),
    "HTTP_VERSION": ProblemKind(505, "This version of HTTP is not spoken here"),
    # What is scarce
    "RATE_LIMITED": ProblemKind(429, "Too many messages in a short time"),
    "TOO_MANY_STREAMS": ProblemKind(429, "You opened too many streams at once"),
    "SERVER_FULL": ProblemKind(503, "This server holds as many connections as it can"),
    "DRAINING": ProblemKind(503, "This server is shutting down"),
    "UNAVAILABLE": ProblemKind(503, "The chat cannot do this right now"),
    "INTERNAL": ProblemKind(500, "Something went wrong on our side"),
}

TITLES: dict[int, str] = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class ProblemBody(Confidential, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Served as `application/problem+json`; the front end reads `error` and `code`."""

    error: str
    code: str
    type: str
    title: str
    status: int
    detail: str
    message: str | None = None
    upgrade_url: str | None = None
    limit: int | None = None
    enabled: bool | None = None


def problem_body(
    code: str,
    *,
    detail: str | None = None,
    limit: int | None = None,
    enabled: bool | None = None,
) -> ProblemBody:
    """The body for `code`.

    Args:
        detail: a sentence of ours that says more than the code's own; never the client's words.
        limit: the limit that was passed, where there is one.
        enabled: False where the chat is turned off and the client asked whether it is.
    """
    status, sentence = PROBLEMS[code]
    subscription = code == "SUBSCRIPTION_REQUIRED"
    return ProblemBody(
        error=sentence,
        code=code,
        type="urn:sottovoce:problem:" + code.lower().replace("_", "-"),
        title=TITLES[status],
        status=status,
        detail=detail or sentence + ".",
        message="Subscribe to use the chat." if subscription else None,
        upgrade_url=UPGRADE_URL if subscription else None,
        limit=limit,
        enabled=enabled,
    )
