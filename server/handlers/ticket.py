"""`POST /api/chat/ticket`: a credential for one cross-origin `EventSource`, which can set no
header. It opens streams of one channel only: the first within half a minute, further ones until the
session's lease ends, because an `EventSource` reconnects with the URL that it was made with."""

import secrets

from protocol.replies import Ticket
from server.service import Service, ticket_digest
from server.web.request import Request
from server.web.response import Response, json_response
from storage import store

TICKET_SECONDS = 30
"""How long a page may take from asking for a ticket to its stream: a slow phone's round trips."""


async def issue_ticket(service: Service, request: Request) -> Response:
    claims = await service.authenticate(request)
    await service.caller(request)
    ticket = secrets.token_urlsafe(32)
    await service.store.issue_ticket(
        ticket_digest(ticket),
        store.Ticket(
            subject=claims.subject,
            session_id=claims.session_id,
            impersonator=claims.actor,
            session_expires_at=claims.expires_at,
        ),
        seconds=TICKET_SECONDS,
    )
    return json_response(Ticket(ticket=ticket, expires_in=TICKET_SECONDS))
