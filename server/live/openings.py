"""What streams without a cursor have begun with lately: both people of a channel come for the
same session, and whoever reloads a page comes again. The events are kept as they are sent, so
nothing is read, decoded or encoded for the next one."""

from collections import OrderedDict
from typing import NamedTuple

import trio

KEPT_SECONDS = 30.0
MAX_BYTES = 32 * 1024 * 1024
"""Of all of them; some 5,000 channels with 20 messages each."""


class _Opening(NamedTuple):
    head: int
    events: bytes
    until: float


class Openings:
    """The newest events of channels, for a while."""

    def __init__(self) -> None:
        self._of: OrderedDict[int, _Opening] = OrderedDict()
        """By channel; the oldest first."""
        self._size = 0

    def __len__(self) -> int:
        """Bytes that are kept."""
        return self._size

    def keep(self, channel_id: int, head: int, events: bytes) -> None:
        """A stream began with these, which end at `head`."""
        self.forget(channel_id)
        self._of[channel_id] = _Opening(head, events, trio.current_time() + KEPT_SECONDS)
        self._size += len(events)
        while self._size > MAX_BYTES:
            self.forget(next(iter(self._of)))

    def find(self, channel_id: int, head: int) -> bytes | None:
        """The events, if they end where the channel does now."""
        opening = self._of.get(channel_id)
        return opening.events if opening is not None and opening.head == head else None

    def forget(self, channel_id: int) -> None:
        """Again is no error."""
        if (opening := self._of.pop(channel_id, None)) is not None:
            self._size -= len(opening.events)

    def forget_old(self) -> None:
        """Those whose time is over."""
        now = trio.current_time()
        while self._of:
            channel_id, opening = next(iter(self._of.items()))
            if opening.until > now:
                break
            self.forget(channel_id)
