"""Why the server ends a stream, or begins none: one table, as WIRE.md names the reasons.

`reconnect` is told to the client; `next_status` is what its next request gets where coming
back is pointless. `EventSource` stops for good at any status but 200 (WHATWG HTML §9.2.3), so a
refusal that will pass is told to it as a stream that closes at once: see `PASSING`.
"""

from enum import StrEnum
from typing import NamedTuple


class ClosingReason(StrEnum):
    DRAIN = "drain"
    SLOW = "slow"
    SESSION_ENDED = "session_ended"
    ACCESS_REVOKED = "access_revoked"
    SUBSCRIPTION_ENDED = "subscription_ended"
    MAX_AGE = "max_age"
    TOO_MANY_STREAMS = "too_many_streams"
    CHAT_DISABLED = "chat_disabled"
    CHANNEL_BLOCKED = "channel_blocked"
    SERVER_FULL = "server_full"
    UNAVAILABLE = "unavailable"


class ClosingRule(NamedTuple):
    reconnect: bool
    next_status: int | None
    """None: the next request may well succeed."""
    meaning: str
    pause: float = 0.0
    """Seconds that the client is asked to stay away at least, where that is more than the setting
    SOTTOVOCE_RETRY_MILLISECONDS."""


TOO_MANY_PAUSE_SECONDS = 120.0
"""With one living tab more than allowed, one of them is always away, for this long up to twice
this long. Every return ends the then oldest stream, so that in ten minutes at most five do after
the first, and no tab twice. Half as long would show a change of tabs every minute and a half;
twice as long would leave the tab that somebody looks at silent for eight minutes."""

R = ClosingReason
CLOSING_RULES: dict[ClosingReason, ClosingRule] = {
    R.DRAIN: ClosingRule(True, None, "this process is shutting down; another one answers"),
    R.SLOW: ClosingRule(True, None, "the reader fell too far behind; resume by the last id"),
    R.SESSION_ENDED: ClosingRule(
        True, None, "the session token is too old; come back with a fresh one (401 if none)"
    ),
    R.ACCESS_REVOKED: ClosingRule(False, 403, "the channel is no longer this user's"),
    R.SUBSCRIPTION_ENDED: ClosingRule(False, 403, "the subscription is no longer active"),
    R.MAX_AGE: ClosingRule(True, None, "no stream lives longer than this; resume by the last id"),
    R.TOO_MANY_STREAMS: ClosingRule(
        True,
        None,
        "this user opened more streams than allowed, and this one was the oldest",
        TOO_MANY_PAUSE_SECONDS,
    ),
    R.CHAT_DISABLED: ClosingRule(False, 404, "the chat was turned off"),
    R.CHANNEL_BLOCKED: ClosingRule(False, 403, "the channel was blocked"),
    R.SERVER_FULL: ClosingRule(
        True, None, "this server holds as many connections or streams as it can", 5.0
    ),
    R.UNAVAILABLE: ClosingRule(True, None, "the chat cannot do this right now", 5.0),
}

PASSING: dict[str, ClosingReason] = {
    "TOKEN_EXPIRED": R.SESSION_ENDED,
    "TOO_MANY_STREAMS": R.TOO_MANY_STREAMS,
    "SERVER_FULL": R.SERVER_FULL,
    "DRAINING": R.DRAIN,
    "UNAVAILABLE": R.UNAVAILABLE,
    "INTERNAL": R.UNAVAILABLE,
}
"""The problems (rows of `protocol.problems`) that waiting may mend, and the reason that a stream
closes with in their place."""


def least_pause(reason: ClosingReason, milliseconds: int) -> int:
    """How long the client of a closing stream stays away at least, in milliseconds.

    Args:
        milliseconds: what it is at least for any reason.
    """
    return max(milliseconds, round(CLOSING_RULES[reason].pause * 1000))
