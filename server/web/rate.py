"""How often one user may send: a token bucket each (RFC 2697's single rate, in messages)."""

import trio

from server.web.problems import Problem

MAX_BUCKETS = 50_000
"""Users remembered; a bucket that is full again is forgotten first."""


class SendRate:
    """Args:
    per_second: messages; twice as many may come at once.
    """

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._burst = per_second * 2
        self._buckets: dict[int, tuple[float, float]] = {}
        """User → (tokens, when that was)."""

    def spend(self, user_id: int) -> None:
        """Take one message's token.

        Raises:
            Problem: RATE_LIMITED, with when there will be one.
        """
        now = trio.current_time()
        tokens, then = self._buckets.get(user_id, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        if tokens < 1:
            raise Problem("RATE_LIMITED", retry_after=(1 - tokens) / self._rate)
        if len(self._buckets) >= MAX_BUCKETS:
            self._forget_full(now)
        self._buckets[user_id] = (tokens - 1, now)

    def _forget_full(self, now: float) -> None:
        refill = self._burst / self._rate
        self._buckets = {u: b for u, b in self._buckets.items() if now - b[1] < refill}
