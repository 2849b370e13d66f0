"""The campaign's tables: a time over its limit is said, and what was not measured is not judged."""

import io
import math
from collections import Counter

import pytest
from rich.console import Console

from bench.faults.campaign import MORE, Outcome, Times, Usage, Window
from bench.faults.faults import FAULTS
from bench.faults.ledger import Ledger, Violation
from bench.faults.report import LIMITS, rows, show

GOOD = Times(
    1.0, same=0.01, other=0.02, answer=0.05, sends_back=0.1, streams_back=0.5, ready_back=1.0
)
USAGE = Usage(descriptors=100, tasks=200, connections=4, megabytes=200.0)
NOTHING = Times(1.0, None, None, None, None, None, None)


def outcome(times: dict[str, list[Times]], *violations: Violation) -> Outcome:
    return Outcome(
        seed=7,
        ledger=Ledger(),
        violations=list(violations),
        waited=[0.01, 0.02],
        windows=[Window(kind, 1.0, 2.0, True, 3.0) for kind in times for _ in times[kind]],
        times=times,
        before=USAGE,
        after=USAGE,
        silences=0,
        complaints=Counter({"dependency_down": 2}),
        busy=50.0,
    )


def test_every_limit_is_of_some_fault():
    for limit in LIMITS:
        assert any(kind.startswith(limit.kinds) for kind in FAULTS), limit.what


def test_what_is_within_its_limits_holds():
    found = rows(outcome({kind: [GOOD, NOTHING] for kind in FAULTS}))
    assert len(found) == len(LIMITS)
    assert all(row.held for row in found)


def test_what_was_not_measured_is_not_judged():
    assert rows(outcome({kind: [NOTHING] for kind in FAULTS})) == []


@pytest.mark.parametrize(
    ("kind", "slow", "what"),
    [
        ("valkey hangs", {"same": 0.26}, "on this server"),
        ("valkey killed", {"other": 1.1}, "over the other server"),
        ("one server loses valkey", {"other": 5.1}, "never published"),
        ("valkey killed", {"ready_back": 5.1}, "used again"),
        ("postgres killed", {"answer": 2.1}, "slowest answer"),
        ("the way to postgres is cut", {"sends_back": 3.1}, "sends succeed"),
        ("worker killed", {"streams_back": 3.1}, "live after"),
        (
            "worker killed after a commit that was never published",
            {"other": 5.1},
            "never published",
        ),
    ],
)
def test_one_fault_over_its_limit_is_said(kind: str, slow: dict[str, float], what: str):
    times = {name: [GOOD] for name in FAULTS} | {kind: [GOOD, GOOD._replace(**slow), GOOD]}
    found = outcome(times)
    (row,) = [row for row in rows(found) if not row.held]
    assert what in row.limit.what
    assert row.middle <= row.limit.most < row.worst
    text = io.StringIO()
    show(found, Console(file=text, width=160))
    assert "SHORT" in text.getvalue()


def test_a_defect_of_ours_is_told_from_a_broken_part():
    found = outcome({"valkey killed": [GOOD]})
    assert found.defects == []
    found = found._replace(complaints=Counter({"dependency_down": 2, "task_failed": 1}))
    assert found.defects == ["task_failed"]
    text = io.StringIO()
    show(found, Console(file=text, width=160))
    assert "DEFECTS of ours: task_failed" in text.getvalue()


@pytest.mark.parametrize("name", Usage._fields)
@pytest.mark.parametrize("more", [1.01, math.nan])
def test_what_the_servers_keep_is_said(name: str, more: float):
    found = outcome({"valkey killed": [GOOD]})
    at_most = getattr(USAGE, name) + getattr(MORE, name)
    assert found._replace(after=USAGE._replace(**{name: at_most})).leaks == []
    (leak,) = found._replace(after=USAGE._replace(**{name: at_most * more})).leaks
    assert leak.startswith(name)


def test_violations_are_shown():
    text = io.StringIO()
    found = outcome({"valkey killed": [GOOD]}, Violation("lost", "channel 1", "gone"))
    show(found, Console(file=text, width=160))
    assert "VIOLATION lost: channel 1: gone" in text.getvalue()
    assert "violations: 1 (lost 1)" in text.getvalue()
