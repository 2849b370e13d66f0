"""`POST /api/chat/messaging`: one endpoint, five actions."""

import structlog

from protocol import requests
from protocol.replies import ChannelCreated, ChannelExists, Channels, Done, Messages
from server.handlers.send import check_text, send_message
from server.service import Service
from server.web.decode import decode
from server.web.problems import Problem
from server.web.request import Request
from server.web.response import Response, json_response
from storage.contract import ChannelGone

log = structlog.get_logger("server")


async def messaging(service: Service, request: Request) -> Response:
    await service.authenticate(request)
    raw = await request.json_bytes(
        limit=service.settings.max_body_bytes, seconds=service.settings.body_seconds
    )
    action: requests.Action = decode(requests.decode_action, raw)
    match action:
        case requests.SendMessageAction() as body:
            return await send_message(service, request, body)
        case requests.GetMessages() as body:
            return await get_messages(service, request, body)
        case requests.ListChannels():
            return await list_channels(service, request)
        case requests.CreateChannel() as body:
            return await create_channel(service, request, body)
        case requests.MarkRead() as body:
            return await mark_read(service, request, body)


async def get_messages(service: Service, request: Request, body: requests.GetMessages) -> Response:
    permit = await service.permit(request, body.channel_id)
    if body.last_message_id is None:
        try:
            page = await service.store.history(
                body.channel_id, None, head=permit.channel.head, size=body.max_results
            )
        except ChannelGone:
            raise Problem("NOT_YOUR_CHANNEL") from None
        records = page.records
    else:
        found = await service.store.page_before(
            body.channel_id, body.last_message_id, size=body.max_results
        )
        if found is None:
            raise Problem("MESSAGE_NOT_FOUND")
        records = found
    service.note(request, "history_read")
    return json_response(Messages(messages=[record.reply() for record in records]))


async def list_channels(service: Service, request: Request) -> Response:
    user = await service.caller(request)
    subscribed = service.gate.subscription(user).active
    if user.therapist_id is None and not subscribed:
        raise Problem("SUBSCRIPTION_REQUIRED")
    channels = await service.store.channels_of(user.id, as_prospect=subscribed)
    return json_response(Channels(channels=channels))


async def create_channel(
    service: Service, request: Request, body: requests.CreateChannel
) -> Response:
    """A therapist for themselves, or a prospect for themselves; never for somebody else."""
    user = await service.caller(request)
    as_therapist = user.therapist_id == body.therapist_id
    as_prospect = user.id == body.prospect_user_id
    if as_therapist == as_prospect:  # neither, or with themselves
        raise Problem("NOT_YOUR_CHANNEL")
    if as_prospect:
        service.gate.require_subscription(user)
    if body.channel_name is not None:
        check_text(body.channel_name, limit=200)
    pair = await service.store.pair(body.therapist_id, body.prospect_user_id)
    if pair is None or not pair[1]:
        raise Problem("NOT_YOUR_CHANNEL")
    channel, made = await service.store.create_channel(
        body.therapist_id, body.prospect_user_id, body.channel_name, for_user=user.id
    )
    request.channel_id = channel.id
    if not made:
        return json_response(ChannelExists(channel_id=channel.id))
    service.note(request, "channel_created")
    log.info("channel_created", request_id=request.id, user_id=user.id, channel_id=channel.id)
    return json_response(ChannelCreated(channel_id=channel.id, channel=channel))


async def mark_read(service: Service, request: Request, body: requests.MarkRead) -> Response:
    permit = await service.permit(request, body.channel_id)
    await service.store.mark_read(body.channel_id, as_therapist=permit.role == "therapist")
    return json_response(Done())
