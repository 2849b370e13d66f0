"""Fifty conversations at once, over two workers, with every stream cut ten times."""

import random

import pytest

from tests.support.running import running_server
from tests.system.crowd import Ledger, Pair, Reader, run_crowd, seed_pairs

SEED = 20261122
"""Which moments the streams are cut at; `crowd.py` takes any."""


async def test_each_acknowledged_message_is_shown_once_and_in_order_through_a_thousand_cuts():
    with running_server(workers=2, SOTTOVOCE_LOG_LEVEL="warning") as server:
        pairs = seed_pairs(50, server.data_dir)
        figures = await run_crowd(server.base_url, pairs, sends=5000, cuts=10, seed=SEED)
    assert figures["violations"] == []
    assert figures["acknowledged"] == 5000
    assert figures["shown"] == 10_000
    assert figures["connections"] >= 100 * 11


@pytest.fixture
def ledger_and_reader() -> tuple[Ledger, Reader]:
    """Three messages, acknowledged and shown."""
    ledger = Ledger()
    reader = Reader(Pair(1, "", ""), "", [], random.Random(0))
    for seq, message_id in ((1, "a"), (2, "b"), (3, "c")):
        ledger.note(1, seq, message_id)
        reader.shown.append((seq, message_id))
    return ledger, reader


def test_a_true_record_is_believed(ledger_and_reader: tuple[Ledger, Reader]):
    ledger, reader = ledger_and_reader
    assert ledger.check([reader]) == []


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ([(1, "a"), (3, "c")], "not shown"),
        ([(1, "a"), (2, "b"), (2, "b"), (3, "c")], "shown twice"),
        ([(1, "a"), (3, "c"), (2, "b")], "out of order"),
        ([(1, "a"), (2, "x"), (3, "c")], "another message"),
        ([(1, "a"), (2, "b"), (3, "c"), (4, "d")], "nobody sent"),
    ],
    ids=["lost", "doubled", "reordered", "swapped", "leaked"],
)
def test_a_forged_record_is_caught(
    ledger_and_reader: tuple[Ledger, Reader], shown: list[tuple[int, str]], found: str
):
    ledger, reader = ledger_and_reader
    reader.shown = shown
    assert any(found in line for line in ledger.check([reader]))


def test_a_number_given_twice_and_a_message_stored_twice_are_caught(
    ledger_and_reader: tuple[Ledger, Reader],
):
    ledger, reader = ledger_and_reader
    ledger.note(1, 2, "other")
    ledger.note(1, 4, "a")
    lines = ledger.check([reader])
    assert any("number 2 was given twice" in line for line in lines)
    assert any("stored twice" in line for line in lines)
