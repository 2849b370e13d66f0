"""Who may do what: the table of WIRE.md, on top of what the store knows of a user.

The role comes from the channel's row, never from a global flag.
"""

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Literal, NamedTuple

import trio

from protocol.closing import ClosingReason
from protocol.replies import Subscription
from server.web.problems import Problem
from storage.contract import Access, ChannelAccess, Eviction, StoreUnavailable, User
from storage.store import Store

MAX_CACHED = 50_000
STALE_SECONDS = 300.0
"""While PostgreSQL is gone, what it said last is believed this long: nothing newer can have
been decided, for it is PostgreSQL that decisions are written to."""


MAX_EVICTED = 10_000
"""Evictions remembered one by one; with one more everything counts as evicted, once."""
MAX_LOOKS = 3
"""At one question whose answer is evicted while it is on its way."""


_ENDED_BY = {
    "SUBSCRIPTION_REQUIRED": ClosingReason.SUBSCRIPTION_ENDED,
    "CHANNEL_BLOCKED": ClosingReason.CHANNEL_BLOCKED,
}
"""Why an open stream ends, by the problem that its next request would get."""


class Permit(NamedTuple):
    """A user's way into one channel."""

    user: User
    channel: ChannelAccess
    role: Literal["therapist", "prospect"]


class Gate:
    """Decides, from a short memory of what the store said.

    Only what lets somebody in is remembered: who has just paid, or was just given a channel,
    does not wait. What was asked before an eviction is not used after it.

    Args:
        cache: seconds that an answer is believed.
        trials: whether `trialing` counts as active.
    """

    def __init__(self, store: Store, *, cache: float, trials: bool) -> None:
        self._store = store
        self._cache = cache
        self._trials = trials
        self._known: OrderedDict[tuple[str, int | None], tuple[float, Access]] = OrderedDict()
        """(when it was asked for, what the store said)"""
        self._evicted: dict[tuple[str, str | int], float] = {}
        """(of what kind, which) → when."""
        self._all_evicted = -math.inf

    async def look(self, subject: str, channel_id: int | None) -> Access:
        """What is known of a Clerk `sub` and a channel, seconds old at most.

        Raises:
            StoreUnavailable
        """
        key = (subject, channel_id)
        known = self._known.get(key)
        if known is not None and self._is_evicted(subject, channel_id, known):
            del self._known[key]
            known = None
        now = trio.current_time()
        if known is not None and now - known[0] < self._cache:
            return known[1]
        for _ in range(MAX_LOOKS):
            asked = trio.current_time()
            try:
                access = await self._store.access(subject, channel_id)
            except StoreUnavailable:
                if known is not None and now - known[0] < STALE_SECONDS:
                    return known[1]
                raise
            if self._learn(key, (asked, access), lets_in=self._lets_in(access, channel_id)):
                break
        return access

    async def why_end(
        self, asked_for: Collection[tuple[str, int]]
    ) -> dict[tuple[str, int], ClosingReason | None]:
        """Look again for open streams, all in one statement: why each must end, or None.

        Args:
            asked_for: (Clerk `sub`, channel id) of each.

        Raises:
            StoreUnavailable
        """
        reasons: dict[tuple[str, int], ClosingReason | None] = {}
        left = list(asked_for)
        for _ in range(MAX_LOOKS):
            asked = trio.current_time()
            evicted = []
            for key, access in zip(left, await self._store.accesses(left), strict=True):
                reasons[key] = reason = self._why_end(access)
                if not self._learn(key, (asked, access), lets_in=reason is None):
                    evicted.append(key)
            if not (left := evicted):
                break
        return reasons

    def forget(self, eviction: Eviction) -> None:
        """Believe nothing of it that was asked for until now. Plain."""
        now = trio.current_time()
        names: list[tuple[str, str | int | None]] = [
            ("user", eviction.user_id),
            ("clerk", eviction.clerk_id),
            ("channel", eviction.channel_id),
        ]
        self._evicted.update(((kind, value), now) for kind, value in names if value is not None)
        if eviction.all or len(self._evicted) > MAX_EVICTED:
            self._all_evicted = now
            self._evicted.clear()

    def active(self, access: Access) -> User:
        """The user, if they may use the chat at all.

        Raises:
            Problem: USER_NOT_FOUND, USER_INACTIVE.
        """
        if access.user is None:
            raise Problem("USER_NOT_FOUND")
        if not access.user.is_active:
            raise Problem("USER_INACTIVE")
        return access.user

    def permit(self, access: Access) -> Permit:
        """What lets a user read and write a channel.

        Raises:
            Problem: USER_NOT_FOUND, USER_INACTIVE, NOT_YOUR_CHANNEL (in the same words whether
                it exists or not), SUBSCRIPTION_REQUIRED.
        """
        user, channel = self.active(access), access.channel
        if channel is None or not (channel.is_therapist or channel.is_prospect):
            raise Problem("NOT_YOUR_CHANNEL")
        if not channel.is_therapist:
            self.require_subscription(user)
        return Permit(user, channel, "therapist" if channel.is_therapist else "prospect")

    def require_open(self, permit: Permit) -> None:
        """Raises:
        Problem: CHANNEL_BLOCKED. Its history can still be read, but nobody listens to it.
        """
        if permit.channel.status == "blocked":
            raise Problem("CHANNEL_BLOCKED")

    def _why_end(self, access: Access) -> ClosingReason | None:
        try:
            self.require_open(self.permit(access))
        except Problem as problem:
            return _ENDED_BY.get(problem.code, ClosingReason.ACCESS_REVOKED)
        return None

    def subscription(self, user: User) -> Subscription:
        if user.subscription_status == "active":
            return Subscription(active=True, source="subscription")
        if user.subscription_status == "trialing" and self._trials:
            return Subscription(active=True, source="trial")
        if user.sponsored:
            return Subscription(active=True, source="employer")
        return Subscription(active=False, source=None)

    def require_subscription(self, user: User) -> None:
        """Raises:
        Problem: SUBSCRIPTION_REQUIRED.
        """
        if not self.subscription(user).active:
            raise Problem("SUBSCRIPTION_REQUIRED")

    def _lets_in(self, access: Access, channel_id: int | None) -> bool:
        user, channel = access
        if user is None or not user.is_active:
            return False
        if channel_id is None:
            return self.subscription(user).active
        return (
            channel is not None
            and channel.status != "blocked"
            and (channel.is_therapist or (channel.is_prospect and self.subscription(user).active))
        )

    def _learn(
        self, key: tuple[str, int | None], known: tuple[float, Access], *, lets_in: bool
    ) -> bool:
        """Remember what lets somebody in, forget what does not. False if it was evicted on its
        way, and says nothing."""
        evicted = self._is_evicted(*key, known)
        if evicted or not lets_in:
            self._known.pop(key, None)
        else:
            self._known[key] = known
            self._known.move_to_end(key)
            if len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return not evicted

    def _is_evicted(
        self, subject: str, channel_id: int | None, known: tuple[float, Access]
    ) -> bool:
        """Whether it was asked for before an eviction, or with it."""
        asked, access = known
        if asked <= self._all_evicted:
            return True
        if not self._evicted:  # nearly always
            return False
        names: list[tuple[str, str | int]] = [("clerk", subject)]
        if channel_id is not None:
            names.append(("channel", channel_id))
        if access.user is not None:
            names.append(("user", access.user.id))
        return any(asked <= self._evicted.get(name, -math.inf) for name in names)
