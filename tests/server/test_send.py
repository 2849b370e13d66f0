"""How long a send may take: what came before the append counts."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from protocol.requests import SendMessage
from server.handlers.send import LEAST_SHARE, send_message
from server.settings import Settings
from storage.contract import StoreUnavailable, User

(STORE_SECONDS,) = (
    field.default for field in msgspec.structs.fields(Settings) if field.name == "store_seconds"
)


async def given(look: float) -> list[float]:
    """The seconds that the append was given, where the look at access took so long."""
    seconds: list[float] = []
    user = User(
        id=1,
        clerk_id="user_1",
        email="a@example.com",
        first_name="A",
        last_name="B",
        is_active=True,
        subscription_status="active",
        sponsored=False,
        therapist_id=None,
    )

    async def permit(*_: Any) -> Any:
        await trio.sleep(look)
        return SimpleNamespace(user=user, role="prospect")

    async def append(_: Any, **options: float) -> Any:
        seconds.append(options["seconds"])
        raise StoreUnavailable

    service: Any = SimpleNamespace(
        settings=SimpleNamespace(
            max_message_characters=100, store_seconds=STORE_SECONDS, forwarded_hops=0
        ),
        permit=permit,
        send_rate=SimpleNamespace(spend=lambda _: None),
        store=SimpleNamespace(append=append),
    )
    request: Any = SimpleNamespace(header=lambda _: None, origin=lambda **_: None)
    with pytest.raises(StoreUnavailable):
        await send_message(service, request, SendMessage(channel_id=12, content="x"))
    return seconds


@pytest.mark.parametrize(
    ("look", "left"),
    [(0.0, STORE_SECONDS), (0.5, STORE_SECONDS - 0.5), (1.5, LEAST_SHARE * STORE_SECONDS)],
)
async def test_the_append_has_what_is_left_of_the_time(autojump_clock, look: float, left: float):
    assert await given(look) == pytest.approx([left])


async def test_all_of_it_takes_less_than_two_seconds_by_default(autojump_clock):
    (seconds,) = await given(STORE_SECONDS)
    assert STORE_SECONDS + seconds < 2.0
