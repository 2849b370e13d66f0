"""The audit trail's rows: gathered, written in batches, kept while PostgreSQL is away."""

import random
import time
from collections import deque

import msgspec
import structlog
import trio

from protocol.confidential import Confidential
from storage.contract import Origin, StoreUnavailable
from storage.metrics import AUDIT_ROWS_LOST
from storage.postgres.pool import Pool, StatementFailed

log = structlog.get_logger("storage")

MAX_WAITING = 20_000
"""Rows kept while they cannot be written; some 10 MB. The oldest are given up first."""
MAX_BATCH = 500
GATHER_SECONDS = 0.1
"""That rows gather before they are written: nobody waits for them, and a batch costs as much as
a row. What a process that is killed has not written is lost."""
RETRY_SECONDS = 0.5
FLUSH_SECONDS = 3.0
"""For the rows that wait when the process ends."""


class AuditRow(Confidential, frozen=True, kw_only=True):
    at: int
    """Milliseconds since the epoch."""
    actor: str | None
    impersonator: str | None
    user_id: int | None
    action: str
    channel_id: int | None
    outcome: str
    """`ok` or `refused`."""
    detail: str | None
    """A problem's code or a closing reason."""
    address: str | None
    request_id: str

    @classmethod
    def build(
        cls,
        origin: Origin,
        action: str,
        *,
        channel_id: int | None = None,
        outcome: str = "ok",
        detail: str | None = None,
    ) -> "AuditRow":
        return cls(
            at=time.time_ns() // 1_000_000,
            actor=origin.actor,
            impersonator=origin.impersonator,
            user_id=origin.user_id,
            action=action,
            channel_id=channel_id,
            outcome=outcome,
            detail=detail,
            address=origin.address,
            request_id=origin.request_id,
        )


class AuditTrail:
    """Appends to `chat_audit`, which refuses any change of what it has."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: deque[AuditRow] = deque()
        self._arrived = trio.Event()
        self._suspects = 0
        """Rows at the front, one of which was refused: each is written alone."""

    def note(self, row: AuditRow) -> None:
        """Have a row written soon; plain. A row that is given up is logged with its ids."""
        if len(self._waiting) >= MAX_WAITING:
            self._give_up(self._waiting.popleft())
        self._waiting.append(row)
        self._arrived.set()

    async def write(self, row: AuditRow) -> None:
        """Have a row written before anything else happens.

        Raises:
            StoreUnavailable, StatementFailed: it is not written.
        """
        await self._insert([row])

    async def serve(self) -> None:
        """Write rows until cancelled, and what waits then within `FLUSH_SECONDS`."""
        try:
            while True:
                await self._arrived.wait()
                await trio.sleep(GATHER_SECONDS)
                self._arrived = trio.Event()
                while self._waiting:
                    if not await self._write_some():
                        await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
        finally:
            with trio.move_on_after(FLUSH_SECONDS, shield=True):
                while self._waiting and await self._write_some():
                    pass
            while self._waiting:
                self._give_up(self._waiting.popleft())

    async def _write_some(self) -> bool:
        """Whether PostgreSQL took the rows or refused them, so that the next may follow."""
        size = 1 if self._suspects else MAX_BATCH
        batch = [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]
        settled = False
        try:
            await self._insert(batch)
            settled = True
        except StatementFailed:  # a defect of ours: the log keeps what the table would not
            if len(batch) > 1:
                self._suspects = len(batch)
                return True
            settled = True
            self._give_up(batch[0])
        except StoreUnavailable:
            return False
        finally:
            if not settled:
                self._waiting.extendleft(reversed(batch))
        self._suspects = max(0, self._suspects - 1)
        return True

    async def _insert(self, rows: list[AuditRow]) -> None:
        await self._pool.fetch("audit", (msgspec.json.encode(rows).decode(),))

    def _give_up(self, row: AuditRow) -> None:
        AUDIT_ROWS_LOST.inc()
        log.error(
            "audit_row_lost",
            action=row.action,
            user_id=row.user_id,
            channel_id=row.channel_id,
            outcome=row.outcome,
            detail=row.detail,
            request_id=row.request_id,
        )
