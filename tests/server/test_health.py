"""What a server says of itself to whoever decides where traffic goes."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from server.handlers.health import readyz

DATABASE = "users.is_active is missing"


@pytest.mark.parametrize(
    ("redis", "postgres", "unready", "draining", "said"),
    [
        (True, True, [], False, (200, "ready")),
        (False, True, [], False, (200, "degraded")),
        (True, False, ["it is down"], False, (503, "unready")),
        (True, True, [DATABASE], False, (503, "unready")),
        (True, True, ["keys"], False, (503, "unready")),
        (False, True, ["keys"], False, (503, "unready")),
        (True, True, [], True, (503, "unready")),
    ],
)
async def test_traffic_is_asked_for_only_by_who_can_serve_it(
    redis: bool, postgres: bool, unready: list[str], draining: bool, said: tuple[int, str]
):
    known = unready != ["keys"]
    service: Any = SimpleNamespace(
        store=SimpleNamespace(
            redis=SimpleNamespace(up=redis, since=1_700_000_000.0),
            postgres=SimpleNamespace(up=postgres, since=1_700_000_001.0),
            unready=tuple(unready) if known else (),
        ),
        keys=SimpleNamespace(known=known),
        enabled=True,
        draining=draining,
        unready=unready,
    )
    request: Any = None
    answer = await readyz(service, request)
    body = msgspec.json.decode(answer.body)
    assert (answer.status, body["status"]) == said
    assert body["keys"] == ("known" if known else "unknown")
    assert body["database"] == (unready if known else [])
    down = [1_700_000_000] * (not redis) + [1_700_000_001] * (not postgres)
    assert (body["since"] is None) == (not down)
