"""`POST /api/chat/send`: store a message and acknowledge it."""

import uuid

import trio

from protocol import requests
from protocol.replies import Sent
from server.metrics import SENDS
from server.service import Service
from server.web.decode import decode
from server.web.problems import Problem
from server.web.request import Request
from server.web.response import Response, json_response
from storage.contract import (
    ChannelClosed,
    ChannelGone,
    ClientMessageIdReused,
    Draft,
    StoreUnavailable,
)

LEAST_SHARE = 0.1
"""Of a request's time for storage work, for the append, however long what came before it took."""


async def send(service: Service, request: Request) -> Response:
    await service.authenticate(request)
    raw = await request.json_bytes(
        limit=service.settings.max_body_bytes, seconds=service.settings.body_seconds
    )
    return await send_message(service, request, decode(requests.decode_send, raw))


async def send_message(service: Service, request: Request, body: requests.SendMessage) -> Response:
    """Also the `send_message` action. The caller is authenticated.

    Raises:
        Problem: what the text, the channel, the rate or the client message id is refused for.
        StoreUnavailable
    """
    began = trio.current_time()
    check_text(body.content, limit=service.settings.max_message_characters)
    client_message_id = _client_message_id(request, body)
    permit = await service.permit(request, body.channel_id)
    service.send_rate.spend(permit.user.id)
    draft = Draft(
        channel_id=body.channel_id,
        message_id=str(uuid.uuid4()),
        client_message_id=client_message_id,
        sender=permit.user,
        by_therapist=permit.role == "therapist",
        content=body.content,
        message_type=body.message_type,
        origin=request.origin(hops=service.settings.forwarded_hops),
    )
    try:
        # With PostgreSQL hanging the look at access took its whole time, and then believed what it
        # knew: the two together must not take twice as long.
        seconds = service.settings.store_seconds
        left = max(seconds - (trio.current_time() - began), seconds * LEAST_SHARE)
        record = await service.store.append(draft, seconds=left)
    except ClientMessageIdReused:
        SENDS.labels("conflict").inc()
        raise Problem("IDEMPOTENCY_CONFLICT") from None
    except ChannelGone:
        raise Problem("NOT_YOUR_CHANNEL") from None
    except ChannelClosed as closed:
        SENDS.labels("closed").inc()
        raise Problem(f"CHANNEL_{closed.status.upper()}") from None
    except StoreUnavailable:
        SENDS.labels("unavailable").inc()
        raise
    SENDS.labels("ok").inc()
    message = record.reply()
    request.seq = record.seq
    return json_response(Sent(message_id=message.message_id, message=message))


def check_text(text: str, *, limit: int) -> None:
    """Raises:
    Problem: EMPTY_MESSAGE, MESSAGE_TOO_LONG, INVALID_TEXT (PostgreSQL's text holds no NUL).
    """
    if not text or text.isspace():
        raise Problem("EMPTY_MESSAGE")
    if len(text) > limit:
        raise Problem(
            "MESSAGE_TOO_LONG", detail=f"The message is over {limit} characters.", limit=limit
        )
    if "\0" in text:
        raise Problem("INVALID_TEXT")


def _client_message_id(request: Request, body: requests.SendMessage) -> str | None:
    """The body's, or the `Idempotency-Key` header's, bare or as a quoted string
    (draft-ietf-httpapi-idempotency-key-header §2.1)."""
    header = request.header(b"idempotency-key")
    if header is None:
        return None if body.client_message_id is None else str(body.client_message_id)
    try:
        key = uuid.UUID(header.decode("ascii").strip().strip('"'))
    except ValueError:
        raise Problem("INVALID_BODY", detail="The Idempotency-Key must be a UUID.") from None
    if body.client_message_id not in (None, key):
        raise Problem(
            "INVALID_BODY", detail="The Idempotency-Key and `clientMessageId` must be the same."
        )
    return str(key)
