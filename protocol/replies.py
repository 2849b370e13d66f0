"""What the server answers, as WIRE.md lists it."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from protocol.confidential import Confidential


class _Reply(Confidential, frozen=True, kw_only=True, rename="camel"):
    pass


class Message(_Reply, frozen=True, kw_only=True):
    """A stored message, in the replies of `send` and `get_messages`."""

    id: int
    message_id: str
    sender_id: int | None
    """None for a message that is older than this server and whose author is not a user."""
    content: str
    message_type: str
    status: str
    sent_at: str
    """ISO 8601, UTC, milliseconds."""
    sender_first_name: str
    sender_last_name: str
    sender_email: str
    seq: int
    """The `id:` of its event on a stream."""
    client_message_id: str | msgspec.UnsetType = msgspec.UNSET


class Sent(_Reply, frozen=True, kw_only=True):
    success: bool = True
    message_id: str
    message: Message


class Messages(_Reply, frozen=True, kw_only=True):
    success: bool = True
    messages: list[Message]


class Channel(_Reply, frozen=True, kw_only=True):
    """One row of `list_channels`, and what `create_channel` made."""

    id: int
    channel_identifier: str
    therapist_id: int
    prospect_user_id: int
    status: str
    last_message_at: str | None
    last_message_preview: str | None
    unread_count: int
    therapist_name: str
    therapist_title: str | None
    prospect_first_name: str
    prospect_last_name: str
    prospect_email: str
    channel_name: str | None = None


class Channels(_Reply, frozen=True, kw_only=True):
    success: bool = True
    channels: list[Channel]


class ChannelCreated(_Reply, frozen=True, kw_only=True):
    success: bool = True
    channel_id: int
    channel: Channel


class ChannelExists(_Reply, frozen=True, kw_only=True):
    success: bool = True
    channel_id: int
    message: str = "Channel already exists"


class Done(_Reply, frozen=True, kw_only=True):
    success: bool = True


class Subscription(_Reply, frozen=True, kw_only=True):
    active: bool
    source: Literal["subscription", "trial", "employer"] | None


class Availability(_Reply, frozen=True, kw_only=True):
    """What a page needs to show or hide the chat."""

    enabled: bool
    role: Literal["therapist", "prospect"]
    subscription: Subscription
    upgrade_url: str


class Ticket(_Reply, frozen=True, kw_only=True):
    """A credential for the streams of one cross-origin `EventSource`: `?ticket=`."""

    ticket: str
    expires_in: int
    """Seconds."""


def timestamp(ms: int) -> str:
    """Milliseconds since the epoch as ISO 8601 in UTC: `2026-11-22T21:15:29.123Z`."""
    moment = datetime.fromtimestamp(ms // 1000, UTC).replace(tzinfo=None)
    return f"{moment.isoformat()}.{ms % 1000:03d}Z"
