"""A short campaign of faults, with a seed that does not change; `make faults` is the long one."""

from pathlib import Path

import pytest

from bench.faults.campaign import run_campaign
from bench.faults.faults import FAULTS

pytestmark = pytest.mark.once

SEED = 20261123
SECONDS = 50.0
TAKE_LONG = {"a channel's row locked for 10 s"}
"""Left to the long one."""


async def test_nothing_is_lost_doubled_reordered_or_leaked_whatever_breaks(services_folder: Path):
    folder = services_folder / "faults"
    folder.mkdir()
    kinds = [kind for kind in FAULTS if kind not in TAKE_LONG]
    outcome = await run_campaign(
        folder, seed=SEED, seconds=SECONDS, channels=40, rate=60.0, kinds=kinds
    )
    assert [str(violation) for violation in outcome.violations] == []
    assert outcome.defects == []
    assert outcome.leaks == []
    assert outcome.faults.total() >= 10
    assert outcome.ledger.deliveries >= 2000
