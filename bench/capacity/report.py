"""docs/capacity.md: its generated parts and its charts."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.capacity.calibration import Calibration
from bench.capacity.pace import calm
from bench.capacity.plan import Answer, Deployment, plan
from bench.capacity.show import (
    CHECKED,
    HIGHEST,
    cost_rows,
    held_out_rows,
    highest_rows,
    plan_rows,
    send_rows,
    size,
    verdict_rows,
)
from bench.report import fill

PAGE = "capacity.md"
DEPLOYMENTS = {
    "small": Deployment(clients=2_000, sends_per_second=50, cores=2, memory_gb=4),
    "middle": Deployment(clients=200_000, sends_per_second=5_000, cores=8, memory_gb=32),
    "large": Deployment(clients=1_000_000, sends_per_second=20_000, cores=16, memory_gb=64),
}
"""Those of the page."""


def write_report(calibration: Calibration, docs: Path) -> list[Path]:
    """Fill the page and draw the charts; which files that made."""
    from bench.capacity.charts import draw  # matplotlib: not for those who only plan

    page = docs / PAGE
    filled = fill(page.read_text("utf-8"), parts(calibration))
    written = draw(calibration, docs / "plots")
    page.write_text(filled, "utf-8")
    return [page, *written]


def parts(calibration: Calibration) -> dict[str, str]:
    heads = ["held out", *CHECKED]
    answers = {
        name: plan(calibration.model, calibration.storage, deployment, known=calibration.known)
        for name, deployment in DEPLOYMENTS.items()
    }
    return {
        "answers": _table(
            [
                "",
                "clients",
                "sends/s",
                "nodes",
                "CPU of a worker: usual, worst hour",
                "Redis",
                "PostgreSQL",
                "full first",
            ],
            (_in_short(name, answer) for name, answer in answers.items()),
        ),
        "machine": _machine(calibration),
        "highest": _table(
            HIGHEST,
            highest_rows(calibration),
        )
        + "".join(f"\n\n{line}" for line in _most_streams(calibration)),
        "costs": _table(["", "± two standard errors"], cost_rows(calibration)),
        "sends": _table(
            ["sends/s of one worker", "worker, µs of CPU for each", "PostgreSQL, µs", "Redis, µs"],
            send_rows(calibration),
        ),
        "verdict": _table(
            ["", "held-out points within 15 %", "mean error", "worst", "spread of the fit"],
            verdict_rows(calibration),
        ),
        "held-out": _table(heads, held_out_rows(calibration)),
        **{name: _table(["", "", ""], plan_rows(answer)) for name, answer in answers.items()},
    }


def _most_streams(calibration: Calibration) -> Iterator[str]:
    """The most streams that were open, and what sending was like then."""
    for workers in sorted({each.load.workers for each in calibration.measured}):
        mine = [
            each
            for each in calibration.measured
            if each.load.workers == workers and each.load.sends
        ]
        most = max(mine, key=lambda each: each.load.streams, default=None)
        if most is None or not most.load.streams:
            continue
        worst = max(
            (each for each in mine if each.load.streams == most.load.streams),
            key=lambda each: each.load.sends,
        )
        values = worst.values
        met = not calibration.objectives.missed(values, worst.load.sends)
        yield (
            f"Most streams with {workers} worker{'s' * (workers > 1)}: {worst.load.streams:,}, "
            f"with {worst.load.sends:,.0f} sends/s, p50 {values['p50_ms']:.0f} ms, p99 "
            f"{values['p99_ms']:.0f} ms, {values['lost']:.0%} lost: the objectives are "
            f"{'met' if met else 'missed'}."
        )


def _in_short(name: str, answer: Answer) -> list[str]:
    deployment = answer.deployment
    return [
        name,
        f"{deployment.clients:,}",
        f"{deployment.sends_per_second:,.0f}",
        f"{answer.nodes} of {deployment.cores} cores and {deployment.memory_gb:g} GB",
        f"{answer.normal_cpu.value:.0%}, {answer.worst_cpu.value:.0%}",
        f"servers: {answer.redis_shards}; {size(answer.redis_memory)} in all",
        (
            f"cores: {answer.postgres_cores}; "
            f"{size(answer.message_storage + answer.audit_storage)} a year"
        ),
        answer.saturations[0].what,
    ]


def command_of(deployment: Deployment) -> str:
    """How to ask for it."""
    return (
        f"python -m bench plan --clients {deployment.clients} "
        f"--sends-per-second {deployment.sends_per_second:g} --cores {deployment.cores} "
        f"--memory-gb {deployment.memory_gb:g}"
    )


def _machine(calibration: Calibration) -> str:
    facts = "; ".join(f"{name} {fact}" for name, fact in calibration.machine.items())
    kind = "A quick run" if calibration.quick else "A full run"
    windows, quiet = len(calibration.measured), len(calm(calibration.measured))
    return (
        f"{kind}, begun {calibration.began}: {windows} windows, {calibration.seconds:g} s each "
        f"where there was something to do; {quiet} of them count, in the others others slowed the "
        f"machine down. {facts}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    found = list(rows)
    if not found:
        return "Not measured in this run."
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in found]
    return "\n".join(lines)
