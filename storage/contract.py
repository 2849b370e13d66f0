"""What the store promises, and the few types that cross its border.

**Order.** PostgreSQL gives each message of a channel the next number, 1, 2, 3, … without holes,
in the transaction that stores it. Nothing else orders anything.

**Acknowledged is stored.** `append` returns once the transaction is committed, never before,
and never waits for Redis. An append whose outcome is unknown (the connection broke between
commit and answer) is asked again under the same `message_id`, and ends as one message. Where
that fails too, `StoreUnavailable` is raised: the message may or may not be there, and sending
it again with its client message id is safe.

**Reads are proved or come from PostgreSQL.** Messages from Redis are used only if they are
contiguous from the cursor to the newest, and reach at least the head that the caller knows.
Redis may lose, repeat or forget what it likes; it costs time, not messages.

**A store lives in one epoch**, the first that PostgreSQL names, and asks nothing else before. In
another one, which begins when the database was restored to an earlier point and numbers are given
again, it stores nothing (`StoreUnavailable`) and says that it is `over`: all that was believed
goes with it.

**Evictions are word, not truth.** They say that something is to be looked at again, and may be
lost with Redis: whoever caches has a limit of its own, and looks at everything again when told
that something may have been missed.

**Failing is fast.** Every call ends within the time that it was given. `StoreUnavailable`
means that nothing the caller can change would help; it carries when to try again.
"""

from contextlib import suppress
from typing import NamedTuple

import msgspec

from protocol import events, replies
from protocol.confidential import Confidential
from protocol.frames import Frame, message_event, message_frame


class StoreUnavailable(Exception):
    """A dependency is down, hung or overloaded.

    Attributes:
        retry_after: seconds after which another try is worth it.
    """

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the store is unavailable")
        self.retry_after = retry_after


class ClientMessageIdReused(Exception):
    """The same client message id came with other words."""


class ChannelGone(Exception):
    """The channel is not there any more."""


class ChannelClosed(Exception):
    """The channel takes no new messages.

    Attributes:
        status: `blocked` or `archived`.
    """

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class User(Confidential, frozen=True, kw_only=True):
    """A person as the database's `chat_people` tells of them."""

    id: int
    clerk_id: str
    email: str
    first_name: str
    last_name: str
    is_active: bool
    subscription_status: str
    sponsored: bool
    """Whether somebody else pays: an employer or a group."""
    therapist_id: int | None
    """The therapist that this user is, if they are one."""

    @property
    def full_name(self) -> str:
        return f"{self.first_name} {self.last_name}".strip()


class ChannelAccess(NamedTuple):
    """What a channel is to one user. A user may be neither of its two people."""

    channel_id: int
    head: int
    """The newest sequence number when this was read: a lower bound from then on."""
    is_therapist: bool
    is_prospect: bool
    status: str = "active"
    """`active`, `archived`, `blocked`, or another word of the main application's, in lower case."""


class Access(NamedTuple):
    user: User | None
    channel: ChannelAccess | None
    """None if no channel was asked for, or there is none."""


class Origin(Confidential, frozen=True, kw_only=True):
    """Who does something and from where, for the audit row that goes with it."""

    actor: str | None
    """The Clerk `sub`."""
    impersonator: str | None
    """The Clerk `act.sub`."""
    user_id: int | None
    address: str | None
    request_id: str


class Draft(Confidential, frozen=True, kw_only=True):
    """A message to be stored."""

    channel_id: int
    message_id: str
    """A new UUID, made before the first try: asking twice stores once."""
    client_message_id: str | None
    sender: User
    by_therapist: bool
    content: str
    message_type: str
    origin: Origin


class _Details(Confidential, frozen=True, kw_only=True, rename="camel"):
    """What a reply says of a message beyond its event."""

    id: int
    sender_id: int | None
    first_name: str
    last_name: str
    status: str


_encode = msgspec.json.Encoder().encode
_decode_event = msgspec.json.Decoder(events.ChatMessage).decode
_decode_details = msgspec.json.Decoder(_Details).decode


class Record(Confidential, frozen=True, array_like=True):
    """A stored message, encoded once: this is what Redis keeps and publishes, as an array in
    MessagePack, whose five parts are taken apart in one call.

    `event` is the JSON that streams send, `details` what a reply adds to it.
    """

    seq: int
    ts: int
    """Milliseconds since the epoch."""
    event: bytes
    details: bytes
    epoch: int = 0
    """Which past `seq` belongs to."""

    @classmethod
    def build(
        cls,
        *,
        epoch: int,
        channel_id: int,
        seq: int,
        ts: int,
        id: int,  # noqa: A002 - the column's name
        message_id: str,
        client_message_id: str | None,
        sender_id: int | None,
        content: str,
        author: str,
        author_email: str,
        message_type: str,
        status: str,
        first_name: str,
        last_name: str,
    ) -> "Record":
        event = events.ChatMessage(
            id=message_id,
            text=content,
            author=author,
            author_email=author_email,
            channel_id=channel_id,
            ts=ts,
            message_type=message_type,
            client_message_id=client_message_id or msgspec.UNSET,
        )
        details = _Details(
            id=id, sender_id=sender_id, first_name=first_name, last_name=last_name, status=status
        )
        return cls(seq, ts, _encode(event), _encode(details), epoch)

    def encode(self) -> bytes:
        return _pack(self)

    @classmethod
    def decode(cls, raw: bytes) -> "Record":
        """Raises:
        ValueError: these are not `encode`'s bytes.
        """
        try:
            return _unpack_record(raw)
        except msgspec.DecodeError:
            raise ValueError("not a record") from None

    def frame(self) -> Frame:
        return message_frame(self.seq, self.ts, self.event, epoch=self.epoch)

    @property
    def plain(self) -> bytes:
        """The frame's event, for one stream alone."""
        return message_event(self.seq, self.event, epoch=self.epoch)

    def reply(self) -> replies.Message:
        event = _decode_event(self.event)
        details = _decode_details(self.details)
        return replies.Message(
            id=details.id,
            message_id=event.id,
            sender_id=details.sender_id,
            content=event.text,
            message_type=event.message_type,
            status=details.status,
            sent_at=replies.timestamp(event.ts),
            sender_first_name=details.first_name,
            sender_last_name=details.last_name,
            sender_email=event.author_email,
            seq=self.seq,
            client_message_id=event.client_message_id,
        )


_pack = msgspec.msgpack.Encoder().encode
_unpack_record = msgspec.msgpack.Decoder(Record).decode


class Eviction(Confidential, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Word that what was believed of somebody or something may be over: look again.

    Who changes a person's access, subscription or channel publishes it after the commit. It
    says nothing of what changed, and grants nothing.
    """

    user_id: int | None = None
    clerk_id: str | None = None
    channel_id: int | None = None
    all: bool = False

    @classmethod
    def decode(cls, raw: bytes) -> "Eviction":
        """Raises:
        ValueError: it is none, or names nobody.
        """
        eviction = None
        with suppress(msgspec.MsgspecError, RecursionError):
            eviction = _decode_eviction(raw)
        if eviction is None or eviction == cls():
            raise ValueError("not an eviction")
        return eviction

    def encode(self) -> bytes:
        return _encode(self)


_decode_eviction = msgspec.json.Decoder(Eviction).decode


class Page(NamedTuple):
    """Messages of one channel, in order and without holes."""

    records: list[Record]
    head: int
    """The newest sequence number that the source of this page knew."""
    reset: bool = False
    """The cursor was ahead of the channel; these are the newest instead."""
