"""Audit rows are written, late rather than never, in order; what is given up is said."""

from typing import Any

import msgspec
import pytest
import structlog.testing
import trio

from bench.faults.proxy import open_proxy
from storage import audit
from storage.audit import AuditRow, AuditTrail
from storage.contract import StoreUnavailable
from storage.postgres.pool import StatementFailed
from tests.storage.stores import ORIGIN, opened_store
from tests.support.services import Database


def row(number: int, **changes: Any) -> AuditRow:
    fields: dict[str, Any] = {
        "at": 1_700_000_000_000 + number,
        "actor": "user_1",
        "impersonator": "user_admin",
        "user_id": 7,
        "action": "history_read",
        "channel_id": number,
        "outcome": "ok",
        "detail": None,
        "address": "2001:db8::1",
        "request_id": f"request-{number}",
    }
    return AuditRow(**(fields | changes))


def written(database: Database) -> list[int]:
    return [n for (n,) in database.execute("SELECT channel_id FROM chat_audit ORDER BY id")]


class FakePool:
    """Takes rows while it is up."""

    def __init__(self) -> None:
        self.up = True
        self.refuses = ""
        self.batches: list[list[int]] = []

    async def fetch(self, name: str, params: tuple[str]) -> list[Any]:
        await trio.lowlevel.checkpoint()
        assert name == "audit"
        if not self.up:
            raise StoreUnavailable
        rows = msgspec.json.decode(params[0])
        if any(row["request_id"] == self.refuses for row in rows):
            raise StatementFailed("audit", "22P05")
        self.batches.append([row["channel_id"] for row in rows])
        return []

    @property
    def rows(self) -> list[int]:
        return [n for batch in self.batches for n in batch]


async def test_a_row_is_written_as_it_was_noted(database: Database):
    async with opened_store(database) as (store, _):
        store.audit.note(row(5, outcome="refused", detail="NOT_YOUR_CHANNEL"))
    assert database.execute(
        "SELECT (extract(epoch FROM at) * 1000)::bigint, actor, impersonator, user_id, action,"
        " channel_id, outcome, detail, host(address), request_id FROM chat_audit"
    ) == [
        (1_700_000_000_005, "user_1", "user_admin", 7, "history_read", 5, "refused",
         "NOT_YOUR_CHANNEL", "2001:db8::1", "request-5"),
    ]  # fmt: skip


async def test_a_row_is_built_from_who_did_it(database: Database):
    built = AuditRow.build(ORIGIN, "export", channel_id=4, outcome="refused", detail="X")
    assert (built.actor, built.user_id, built.address) == ("user_actor", 1, "203.0.113.9")
    assert (built.action, built.channel_id, built.outcome, built.detail) == (
        "export", 4, "refused", "X",
    )  # fmt: skip
    async with opened_store(database) as (store, _):
        store.audit.note(built)
        store.audit.note(AuditRow.build(ORIGIN, "export"))
    assert database.execute(
        "SELECT count(*) FROM chat_audit WHERE abs(extract(epoch FROM now() - at)) < 60"
    ) == [(2,)]


async def test_a_write_is_there_before_anything_else_happens(database: Database):
    async with opened_store(database) as (store, _):
        await store.audit.write(row(1))
        assert written(database) == [1]


async def test_a_write_fails_while_postgresql_is_away(database: Database):
    host, port = database.conninfo["host"], database.conninfo["port"]
    async with open_proxy(host, port) as proxy:
        behind = {**database.conninfo, "port": proxy.port}
        async with opened_store(database, conninfo=behind) as (store, _):
            proxy.cut()
            with pytest.raises(StoreUnavailable):
                await store.audit.write(row(1))
    assert written(database) == []


async def test_a_write_that_the_table_refuses_fails(database: Database):
    async with opened_store(database) as (store, _):
        with pytest.raises(StatementFailed):
            await store.audit.write(row(1, actor="\0"))


async def test_rows_noted_while_postgresql_is_away_are_written_after_it_in_order(
    database: Database,
):
    host, port = database.conninfo["host"], database.conninfo["port"]
    async with open_proxy(host, port) as proxy:
        behind = {**database.conninfo, "port": proxy.port}
        async with opened_store(database, conninfo=behind) as (store, _):
            store.audit.note(row(0))
            await trio.sleep(0.2)
            proxy.cut()
            for number in range(1, 1200):
                store.audit.note(row(number))
            await trio.sleep(0.5)
            assert written(database) == [0]
            proxy.resume()
            with trio.fail_after(10):
                while len(written(database)) < 1200:
                    await trio.sleep(0.1)
    assert written(database) == list(range(1200))


async def test_what_waits_at_the_end_is_written(database: Database):
    async with opened_store(database) as (store, _):
        for number in range(1100):
            store.audit.note(row(number))
    assert written(database) == list(range(1100))


async def test_rows_keep_their_order_through_failures(autojump_clock):
    pool = FakePool()
    trail = AuditTrail(pool)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trail.serve)
        for number in range(40):
            pool.up = number % 7 < 3
            trail.note(row(number))
            await trio.sleep(0.2)
        pool.up = True
        await trio.sleep(2)
        assert pool.rows == list(range(40))
        nursery.cancel_scope.cancel()


async def test_over_the_limit_the_oldest_are_given_up_and_named(
    autojump_clock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(audit, "MAX_WAITING", 10)
    pool = FakePool()
    pool.up = False
    trail = AuditTrail(pool)  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logs:
        for number in range(13):
            trail.note(row(number))
        assert [(line["event"], line["request_id"]) for line in logs] == [
            ("audit_row_lost", f"request-{n}") for n in range(3)
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trail.serve)
            await trio.sleep(1)
            pool.up = True
            nursery.cancel_scope.cancel()  # written while it ends
    assert pool.rows == list(range(3, 13))


async def test_at_the_end_what_cannot_be_written_is_logged_with_its_ids_alone(autojump_clock):
    class Hung(FakePool):
        async def fetch(self, name: str, params: tuple[str]) -> list[Any]:
            await trio.sleep_forever()
            raise AssertionError

    trail = AuditTrail(Hung())  # type: ignore[arg-type]
    started = trio.current_time()
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trail.serve)
            trail.note(row(4))
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
    assert trio.current_time() - started == 1 + audit.FLUSH_SECONDS
    (line,) = logs
    assert line["event"] == "audit_row_lost"
    assert (line["user_id"], line["channel_id"], line["request_id"]) == (7, 4, "request-4")
    assert "user_1" not in str(line)
    assert "2001:db8::1" not in str(line)


async def test_a_row_that_the_table_refuses_is_given_up_alone(autojump_clock):
    """One that somebody can make by what they send must not take others with it."""
    pool = FakePool()
    pool.up = False
    pool.refuses = "request-3"
    trail = AuditTrail(pool)  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trail.serve)
            for number in range(6):
                trail.note(row(number))
            await trio.sleep(1)
            pool.up = True
            await trio.sleep(1)
            trail.note(row(6))
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
    assert pool.rows == [0, 1, 2, 4, 5, 6]
    assert [line["request_id"] for line in logs] == ["request-3"]
