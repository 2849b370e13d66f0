"""What a stream says: the JSON of each `data:` line.

The first two are read by the existing front end through `onmessage` and may only grow; the
others are named events, which never reach it.
"""

import msgspec

from protocol.closing import ClosingReason
from protocol.confidential import Confidential


class Connected(msgspec.Struct, frozen=True, tag_field="type", tag="connected", rename="camel"):
    """The first event of every stream."""

    channel_id: int
    timestamp: int
    """When the stream opened, in milliseconds since the epoch."""


class ChatMessage(Confidential, frozen=True, kw_only=True, rename="camel"):
    """One message. Its sequence number is not in here: it is the event's `id:`."""

    id: str
    """The message's UUID."""
    text: str
    author: str
    """First and last name."""
    author_email: str
    channel_id: int
    ts: int
    """When it was stored, in milliseconds since the epoch; strictly rising with `id:`."""
    message_type: str
    client_message_id: str | msgspec.UnsetType = msgspec.UNSET
    """What its sender called it, so that a sender can match its own echo."""


class Closing(msgspec.Struct, frozen=True):
    """`event: closing`: the server ends this stream, and whether to come back."""

    reason: ClosingReason
    reconnect: bool


class Reset(msgspec.Struct, frozen=True, rename="camel"):
    """`event: reset`: the cursor was not of this channel's past; what follows starts afresh."""

    channel_id: int


HEARTBEAT = "heartbeat"
CLOSING = "closing"
RESET = "reset"
