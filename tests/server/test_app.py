"""The application between its parts: what outlives an epoch, and what does not."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from server import app as app_module
from server.app import Application
from server.auth.jwks import KeySource
from server.settings import Settings
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
