"""What a client may ask, as WIRE.md lists it: the structs that decode the bodies.

Decoding is strict: `"42"` is no 42, an unknown field or action is refused. What a struct
cannot know (limits from the settings, the text's characters) the handlers check.
"""

from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from protocol.confidential import Confidential

Id = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""A row's number, as the main application's tables count them."""
MessageType = Literal["STANDARD"]
MAX_RESULTS = 200


class _Body(Confidential, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    pass


class SendMessage(_Body, frozen=True, kw_only=True):
    """`POST /api/chat/send`"""

    channel_id: Id
    content: str
    message_type: MessageType = "STANDARD"
    client_message_id: UUID | None = None
    """The same sender, channel and id give back the first message, never a second one."""


class SendMessageAction(
    SendMessage, frozen=True, kw_only=True, tag_field="action", tag="send_message"
):
    """`send_message`: as `POST /api/chat/send`."""


class CreateChannel(_Body, frozen=True, kw_only=True, tag_field="action", tag="create_channel"):
    """`create_channel`: opens the pair's channel, or finds the one that it has."""

    therapist_id: Id
    prospect_user_id: Id
    channel_name: Annotated[str, Meta(min_length=1, max_length=200)] | None = None


class GetMessages(_Body, frozen=True, kw_only=True, tag_field="action", tag="get_messages"):
    """`get_messages`: the newest, or those before `lastMessageId`; oldest first."""

    channel_id: Id
    max_results: Annotated[int, Meta(ge=1, le=MAX_RESULTS)] = 50
    last_message_id: Id | UUID | None = None
    """A message's `id` or its `messageId`."""


class ListChannels(_Body, frozen=True, kw_only=True, tag_field="action", tag="list_channels"):
    """`list_channels`: all that the caller may read."""


class MarkRead(_Body, frozen=True, kw_only=True, tag_field="action", tag="mark_read"):
    """`mark_read`: the caller's unread count becomes 0."""

    channel_id: Id


Action = CreateChannel | SendMessageAction | GetMessages | ListChannels | MarkRead
"""The body of `POST /api/chat/messaging`, told apart by `action`."""

decode_send = msgspec.json.Decoder(SendMessage).decode
decode_action = msgspec.json.Decoder(Action).decode
