"""sse-starlette as its documentation has it: a generator per client that awaits a queue."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

QUEUE_EVENTS = 256

queues: set[asyncio.Queue[str]] = set()


async def events(_: Request) -> EventSourceResponse:
    queue: asyncio.Queue[str] = asyncio.Queue(QUEUE_EVENTS)

    async def follow() -> AsyncIterator[dict[str, str]]:
        queues.add(queue)
        try:
            while True:
                yield {"data": await queue.get()}
        finally:
            queues.discard(queue)

    return EventSourceResponse(follow())


async def publish(request: Request) -> Response:
    text = (await request.body()).decode()
    for queue in queues:
        with suppress(asyncio.QueueFull):
            queue.put_nowait(text)
    return PlainTextResponse("ok\n")


async def answer(request: Request) -> Response:
    await request.body()
    return PlainTextResponse("ok\n")


app = Starlette(
    routes=[
        Route("/events", events),
        Route("/publish", publish, methods=["POST"]),
        Route("/answer", answer, methods=["POST"]),
    ]
)
