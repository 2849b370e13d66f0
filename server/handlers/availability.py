"""`GET /api/chat/availability`: what a page needs to show or hide the chat."""

from protocol.problems import UPGRADE_URL
from protocol.replies import Availability
from server.service import Service
from server.web.request import Request
from server.web.response import Response, json_response


async def availability(service: Service, request: Request) -> Response:
    await service.authenticate(request)
    user = await service.caller(request)
    return json_response(
        Availability(
            enabled=True,
            role="prospect" if user.therapist_id is None else "therapist",
            subscription=service.gate.subscription(user),
            upgrade_url=UPGRADE_URL,
        )
    )
