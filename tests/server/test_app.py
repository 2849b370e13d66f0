"""The application between its parts: what outlives an epoch, and what does not."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from protocol.parser import EventStreamParser
from server import app as app_module
from server import routes
from server.app import Application
from server.auth.jwks import KeySource
from server.settings import Settings, load_settings
from server.web.problems import Problem
from storage.contract import StoreUnavailable
from tests.server.engine.test_supervisor import SETTINGS


async def test_the_issuers_keys_outlive_an_epoch(monkeypatch: pytest.MonkeyPatch):
    """Or a restored database would want the issuer, too."""
    services: list[Any] = []

    @asynccontextmanager
    async def open_service(_: Settings, keys: KeySource) -> AsyncIterator[Any]:
        async def drain(_: Callable[[], int], **__: Any) -> None:
            pass

        services.append(
            SimpleNamespace(
                store=SimpleNamespace(over=trio.Event()),
                keys=keys,
                done=trio.Event(),
                enabled=True,
                draining=False,
                drain=drain,
            )
        )
        yield services[-1]

    monkeypatch.setattr(app_module, "open_service", open_service)
    app = Application(SETTINGS)
    assert app.unready
    tell, told = trio.open_memory_channel[dict[str, Any]](2)
    said: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message["type"])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, {"type": "lifespan"}, told.receive, send)
            await tell.send({"type": "lifespan.startup"})
            while not said:
                await trio.sleep(0.01)
            services[0].store.over.set()
            await services[0].done.wait()
            assert len(services) == 2
            assert services[1].keys is services[0].keys
            await tell.send({"type": "lifespan.shutdown"})
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert services[1].done.is_set()


# Refusals, as an `EventSource` and as others are told


async def answer(app: Application, *, accept: str, method: str = "GET") -> tuple[int, bytes]:
    """The status and body of one request for a stream, while the service is what it is."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/api/chat/42",
        "headers": [(b"accept", accept.encode()), (b"origin", b"https://app.example.com")],
        "query_string": b"",
        "client": None,
    }
    await app(scope, receive, send)
    start, *bodies = sent
    assert (b"access-control-allow-origin", b"https://app.example.com") in start["headers"]
    return start["status"], b"".join(each["body"] for each in bodies)


def with_settings() -> Application:
    """An application between a start and a stop: it has read its settings, and has no service."""
    app = Application({})
    environ = {**SETTINGS, "SOTTOVOCE_ALLOWED_ORIGINS": "https://app.example.com"}
    app._settings = load_settings(environ)
    return app


def closing_of(body: bytes) -> tuple[str, int]:
    """The reason and the pause in milliseconds of a stream that closes at once."""
    parser = EventStreamParser()
    [event] = parser.feed(body)
    said = json.loads(event.data)
    assert (event.event, said["reconnect"]) == ("closing", True)
    assert parser.retry is not None
    return said["reason"], parser.retry


async def test_while_there_is_no_service_an_event_source_is_told_to_come_back():
    app = with_settings()
    status, body = await answer(app, accept="text/event-stream")
    reason, pause = closing_of(body)
    assert (status, reason) == (200, "drain")
    assert 1500 <= pause <= 3000
    status, body = await answer(app, accept="*/*")
    assert (status, json.loads(body)["code"]) == (503, "DRAINING")


@pytest.mark.parametrize(
    ("error", "reason", "least", "status", "code"),
    [
        (Problem("DRAINING", retry_after=1), "drain", 1500, 503, "DRAINING"),
        (Problem("SERVER_FULL", retry_after=7), "server_full", 7000, 503, "SERVER_FULL"),
        (StoreUnavailable(1.0), "unavailable", 5000, 503, "UNAVAILABLE"),
        (StoreUnavailable(9.5), "unavailable", 9500, 503, "UNAVAILABLE"),
        (RuntimeError("canary"), "unavailable", 5000, 500, "INTERNAL"),
        (Problem("TOKEN_EXPIRED", retry_after=5), "session_ended", 5000, 401, "TOKEN_EXPIRED"),
        (Problem("NOT_YOUR_CHANNEL"), None, 0, 403, "NOT_YOUR_CHANNEL"),
        (Problem("UNAUTHENTICATED"), None, 0, 401, "UNAUTHENTICATED"),
        (Problem("NOT_FOUND"), None, 0, 404, "NOT_FOUND"),
    ],
)
async def test_what_waiting_may_mend_is_no_status_to_an_event_source(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str | None,
    least: int,
    status: int,
    code: str,
):
    async def refuses(*_: Any) -> Any:
        raise error

    notes: list[str] = []
    app = with_settings()
    app._service = SimpleNamespace(  # type: ignore[assignment]
        enabled=True,
        settings=app._settings,
        note=lambda *_, detail, **__: notes.append(detail),
    )
    monkeypatch.setattr(routes, "STREAM", msgspec.structs.replace(routes.STREAM, handler=refuses))
    told, body = await answer(app, accept="text/event-stream")
    if reason is None:
        assert (told, json.loads(body)["code"]) == (status, code)
    else:
        assert told == 200
        said, pause = closing_of(body)
        assert said == reason
        assert least <= pause <= 2 * least
    told, body = await answer(app, accept="*/*")
    assert (told, json.loads(body)["code"]) == (status, code)
    assert notes == ([code] * 2 if status < 500 else []), "the audit trail has both"
    told, body = await answer(app, accept="text/event-stream", method="POST")
    assert told == 405
