"""Who may do what: the table of WIRE.md, on top of what the store knows of a user.

The role comes from the channel's row, never from a global flag.
"""

from collections import OrderedDict
from typing import Literal, NamedTuple

import trio

from protocol.closing import ClosingReason
from protocol.replies import Subscription
from server.web.problems import Problem
from storage.contract import Access, ChannelAccess, StoreUnavailable, User
from storage.store import Store

MAX_CACHED = 50_000
STALE_SECONDS = 300.0
"""While PostgreSQL is gone, what it said last is believed this long: nothing newer can have
been decided, for it is PostgreSQL that decisions are written to."""


class Permit(NamedTuple):
    """A user's way into one channel."""

    user: User
    channel: ChannelAccess
    role: Literal["therapist", "prospect"]


class Gate:
    """Decides, from a short memory of what the store said.

    Only what lets somebody in is remembered: who has just paid, or was just given a channel,
    does not wait.

    Args:
        cache: seconds that an answer is believed.
        trials: whether `trialing` counts as active.
    """

    def __init__(self, store: Store, *, cache: float, trials: bool) -> None:
        self._store = store
        self._cache = cache
        self._trials = trials
        self._known: OrderedDict[tuple[str, int | None], tuple[float, Access]] = OrderedDict()

    async def look(self, subject: str, channel_id: int | None) -> Access:
        """What is known of a Clerk `sub` and a channel, seconds old at most.

        Raises:
            StoreUnavailable
        """
        known = self._known.get((subject, channel_id))
        now = trio.current_time()
        if known is not None and now - known[0] < self._cache:
            return known[1]
        try:
            access = await self._store.access(subject, channel_id)
        except StoreUnavailable:
            if known is not None and now - known[0] < STALE_SECONDS:
                return known[1]
            raise
        self._known.pop((subject, channel_id), None)
        return access

    def active(self, access: Access) -> User:
        """The user, if they may use the chat at all.

        Raises:
            Problem: USER_NOT_FOUND, USER_INACTIVE.
        """
        if access.user is None:
            raise Problem("USER_NOT_FOUND")
        if not access.user.is_active:
            raise Problem("USER_INACTIVE")
        if access.channel is None and self.subscription(access.user).active:
            self._remember((access.user.clerk_id, None), access)
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
        self._remember((user.clerk_id, channel.channel_id), access)
        return Permit(user, channel, "therapist" if channel.is_therapist else "prospect")

    async def why_end(self, subject: str, channel_id: int) -> ClosingReason | None:
        """Look again for an open stream: why it must end, or None.

        Raises:
            StoreUnavailable
        """
        try:
            self.permit(await self.look(subject, channel_id))
        except Problem as problem:
            if problem.code == "SUBSCRIPTION_REQUIRED":
                return ClosingReason.SUBSCRIPTION_ENDED
            return ClosingReason.ACCESS_REVOKED
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

    def _remember(self, key: tuple[str, int | None], access: Access) -> None:
        """Keep what was just read; what was only recalled keeps its age."""
        if key not in self._known:
            self._known[key] = (trio.current_time(), access)
            if len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
