"""`GET /api/chat/export`: the whole conversation as a text file, for the channel's therapist."""

import re
import unicodedata
from datetime import UTC, datetime

import structlog

from protocol.replies import Message
from server.service import Service
from server.web.problems import Problem
from server.web.request import Request
from server.web.response import Response
from storage.contract import ChannelGone, StoreUnavailable
from storage.failures import describe
from storage.postgres.pool import StatementFailed
from storage.store import ExportHeader

log = structlog.get_logger("server")

RULE = "=" * 72
BANNER = """\
CONFIDENTIAL
This transcript holds a private conversation between a professional and a client, and may hold
protected health information. It is meant for the professional alone. Keep it as the law asks
for health records; do not forward it."""
CLOSING = """\
End of transcript. Confidential: if it reached you by mistake, delete it and tell the sender."""


async def export(service: Service, request: Request) -> Response:
    """The audit row is written first: an export that cannot be recorded does not happen."""
    await service.authenticate(request)
    channel_id = _channel_id(request)
    permit = await service.permit(request, channel_id)
    if permit.role != "therapist":
        raise Problem("THERAPIST_ONLY")
    header = await service.store.export_header(channel_id)
    if header is None:
        raise Problem("NOT_YOUR_CHANNEL")
    try:
        await service.store.audit.write(service.audit_row(request, "export"))
    except (StoreUnavailable, StatementFailed) as error:
        log.error("export_not_audited", request_id=request.id, **describe(error))
        raise Problem("UNAVAILABLE", retry_after=1) from None
    messages = await _read_all(service, channel_id, header)
    now = datetime.now(UTC)
    body = write_transcript(header, channel_id, messages, now).encode()
    log.info(
        "export",
        request_id=request.id,
        user_id=permit.user.id,
        channel_id=channel_id,
        messages=len(messages),
    )
    name = f"chat-transcript-{_file_name(header)}-{now:%Y%m%dT%H%M%SZ}.txt"
    return Response(
        200,
        body,
        content_type=b"text/plain; charset=utf-8",
        headers=[(b"content-disposition", f'attachment; filename="{name}"'.encode())],
    )


async def _read_all(service: Service, channel_id: int, header: ExportHeader) -> list[Message]:
    messages: list[Message] = []
    after = 0
    while after < header.messages:
        try:
            page = await service.store.history(channel_id, after, head=header.messages)
        except ChannelGone:
            raise Problem("NOT_YOUR_CHANNEL") from None
        if not page.records:
            break
        messages.extend(record.reply() for record in page.records)
        after = page.records[-1].seq
    return messages


def write_transcript(
    header: ExportHeader, channel_id: int, messages: list[Message], now: datetime
) -> str:
    client = f"{header.client_first_name} {header.client_last_name}".strip()
    lines = [
        RULE,
        BANNER,
        RULE,
        "",
        f"Export date: {now:%Y-%m-%d %H:%M:%S} UTC",
        f"Therapist: {header.therapist_name} <{header.therapist_email}>",
        f"Client: {client} <{header.client_email}>",
        f"Channel: {channel_id}",
        f"Messages: {len(messages)}",
        "",
        RULE,
        "",
    ]
    for message in messages:
        name = f"{message.sender_first_name} {message.sender_last_name}".strip()
        lines += [f"[{message.sent_at}] {name or message.sender_email}:", message.content, ""]
    lines += [RULE, CLOSING, RULE, ""]
    return "\n".join(lines)


def _channel_id(request: Request) -> int:
    text = request.query("channelId") or ""
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text, re.ASCII) or int(text) > 2**63 - 1:
        raise Problem("INVALID_QUERY", detail="`channelId` must be a channel's number.")
    return int(text)


def _file_name(header: ExportHeader) -> str:
    """The client's name in the letters that every file system and header takes."""
    name = f"{header.client_first_name}-{header.client_last_name}"
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", ascii_name).strip("-")[:64] or "client"
