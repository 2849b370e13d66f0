"""Why the server ends a stream: one table, as WIRE.md names the reasons.

`reconnect` is told to the client; `next_status` is what its next request gets where coming
back is pointless. `EventSource` stops for good at any status but 200 (WHATWG HTML §9.2.3).
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


class ClosingRule(NamedTuple):
    reconnect: bool
    next_status: int | None
    """None: the next request may well succeed."""
    meaning: str


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
    R.TOO_MANY_STREAMS: ClosingRule(False, 429, "this user holds as many streams as allowed"),
    R.CHAT_DISABLED: ClosingRule(False, 404, "the chat was turned off"),
    R.CHANNEL_BLOCKED: ClosingRule(False, 403, "the channel was blocked"),
}
