"""A calibration and a plan, for a terminal. The rows are the same that docs/capacity.md has."""

import sys

from rich.console import Console
from rich.table import Table

from bench.capacity.calibration import Calibration
from bench.capacity.model import LIKELY, Check, Estimate, check
from bench.capacity.pace import calm
from bench.capacity.plan import PORTS, WIDE_PORTS, WORKER_STREAMS, Answer
from bench.capacity.points import Load
from bench.capacity.search import highest

WIDTH = 130
CHECKED = ("worker cpu", "postgres cpu", "redis cpu", "rss", "statements", "redis commands")
"""What the held-out points are compared in."""
WITHIN = 0.15
BUSY = ("worker cpu", "postgres cpu", "client cpu")
"""Cores at the highest load: is it the server that was measured?"""
HIGHEST = (
    "workers", "streams", "most sends/s", "p50 ms", "p99 ms", "workers' cores", "PostgreSQL's",
    "client's", "the next that failed",
)  # fmt: skip
SEND_STREAMS = 5_000
SEND_RATES = (1.0, 10.0, 100.0, 1_000.0)
COSTS = (
    ("worker cpu", "streams", "CPU of an open stream", 1e6, "µs/s"),
    ("worker cpu", "heartbeats", "CPU of a heartbeat", 1e6, "µs"),
    ("worker cpu", "deliveries", "CPU of a delivery", 1e6, "µs"),
    ("worker cpu", "sends", "CPU of a send", 1e6, "µs"),
    ("worker cpu", "lookups", "CPU of a look-up of access", 1e6, "µs"),
    ("worker cpu", "heard", "CPU of a message heard over Redis", 1e6, "µs"),
    ("worker cpu", "connects", "CPU of a new stream, until it has left", 1e6, "µs"),
    ("worker cpu", "wakings", "CPU of a waking", 1e6, "µs"),
    ("worker cpu", "workers", "CPU of a worker that has nothing to do", 1e6, "µs/s"),
    ("rss", "streams", "memory of an open stream, the worker's", 1e-3, "kB"),
    ("kernel", "streams", "memory of an open stream, the kernel's, both ends", 1e-3, "kB"),
    ("rss", "workers", "memory of a worker without streams", 1e-6, "MB"),
    ("rss", "most connects", "memory of one new stream a second, once it was so", 1e-3, "kB"),
    ("postgres cpu", "sends", "PostgreSQL's CPU of a send", 1e6, "µs"),
    ("postgres cpu", "batches", "PostgreSQL's CPU of a batch", 1e6, "µs"),
    ("postgres cpu", "lookups", "PostgreSQL's CPU of a look-up", 1e6, "µs"),
    ("postgres cpu", "connects", "PostgreSQL's CPU of a new stream", 1e6, "µs"),
    ("redis cpu", "sends", "Redis' CPU of a send", 1e6, "µs"),
    ("redis cpu", "wakings", "Redis' CPU of a waking", 1e6, "µs"),
    ("redis cpu", "connects", "Redis' CPU of a new stream", 1e6, "µs"),
    ("redis commands", "sends", "Redis' commands of a send, those in scripts included", 1, ""),
    ("wal bytes", "sends", "PostgreSQL's log of a send, without whole pages", 1, "bytes"),
)


def cost_rows(calibration: Calibration) -> list[tuple[str, str]]:
    """What one of each costs, with two standard errors."""
    rows = []
    for quantity, term, what, scale, unit in COSTS:
        fit = calibration.model.fits[quantity]
        if term in fit.dropped:
            rows.append((what, "not to be told from nothing"))
            continue
        cost = fit.cost(term)
        text = f"{number(cost.value * scale)} ± {number(LIKELY * cost.error * scale)} {unit}"
        rows.append((what, text.strip()))
    return rows


def send_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """What a send costs in all, with its two deliveries, by how many there are: by the fit."""
    rows: list[tuple[str, ...]] = []
    quiet = Load(streams=SEND_STREAMS)
    for sends in SEND_RATES:
        busy = Load(streams=SEND_STREAMS, sends=sends)
        cells = [
            (
                calibration.model.predict(quantity, busy).value
                - calibration.model.predict(quantity, quiet).value
            )
            / sends
            * 1e6
            for quantity in ("worker cpu", "postgres cpu", "redis cpu")
        ]
        rows.append((f"{sends:,.0f}", *map(number, cells)))
    return rows


def held_out(calibration: Calibration) -> list[Check]:
    return check(calibration.model, calm(calibration.measured), CHECKED, held_out=True)


def held_out_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Each held-out point: the worker's CPU and the rest, each as measured, and how far off."""
    by_load: dict[str, list[str]] = {}
    for each in held_out(calibration):
        scale = {"rss": 1e-6}.get(each.quantity, 1.0)
        cell = f"{number(each.measured * scale)} ({each.off:+.0%})"
        by_load.setdefault(each.load.name, []).append(cell)
    return [(name, *cells) for name, cells in by_load.items()]


def verdict_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Of each quantity: held-out points within 15 %, the mean and the worst error."""
    rows: list[tuple[str, ...]] = []
    checks = held_out(calibration)
    for quantity in CHECKED:
        off = [abs(each.off) for each in checks if each.quantity == quantity]
        if off:
            within = sum(each <= WITHIN for each in off)
            fit = calibration.model.fits[quantity]
            rows.append(
                (
                    quantity,
                    f"{within} of {len(off)}",
                    f"{sum(off) / len(off):.0%}",
                    f"{max(off):.0%}",
                    f"{fit.spread:.0%}",
                )
            )
    return rows


def highest_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for workers, streams in dict.fromkeys((s.workers, s.streams) for s in calibration.steps):
        most = highest(calibration.steps, workers, streams)
        met = [
            step
            for step in calibration.steps
            if (step.workers, step.streams, step.sends) == (workers, streams, most)
        ]
        failed = [
            step
            for step in calibration.steps
            if (step.workers, step.streams) == (workers, streams) and step.missed
        ]
        first = min(failed, key=lambda step: step.sends, default=None)
        rows.append(
            (
                str(workers),
                f"{streams:,}",
                f"{most:,.0f}",
                f"{met[0].values['p50_ms']:.0f}" if met else "",
                f"{met[0].values['p99_ms']:.0f}" if met else "",
                *(f"{met[0].values[name]:.2f}" if met else "" for name in BUSY),
                f"{first.sends:,.0f}: {', '.join(first.missed)}" if first else "",
            )
        )
    return rows


def plan_rows(answer: Answer) -> list[tuple[str, str, str]]:
    """(of what, which, how much)."""
    deployment = answer.deployment
    rows: list[tuple[str, str, str]] = []

    def add(group: str, *lines: tuple[str, str]) -> None:
        for place, (what, text) in enumerate(lines):
            rows.append((group if place == 0 else "", what, text))

    add(
        "servers",
        ("nodes", f"{answer.nodes}: {deployment.cores} cores, {deployment.memory_gb:g} GB each"),
        ("workers", f"{answer.workers:,}: one for each core"),
        ("streams per worker", f"{answer.streams_per_worker:,.0f}"),
        ("CPU of a worker", _percent(answer.normal_cpu)),
        ("memory of a node", _bytes(answer.node_memory)),
        (
            "new streams",
            f"{answer.connects:,.0f} /s: a session ends after {deployment.stay_seconds:g} s",
        ),
        ("out to clients", f"{_bits(answer.egress)}, without TCP and TLS"),
    )
    add(
        "worst hour",
        (
            "a node dies",
            (
                f"{answer.returning:,} clients return in {deployment.reconnect_within:g} s: "
                f"{answer.worst_connects:,.0f} new streams/s"
            ),
        ),
        (
            "streams per worker",
            f"{answer.worst_streams_per_worker:,.0f} of {WORKER_STREAMS:,}",
        ),
        ("CPU of a worker", _percent(answer.worst_cpu)),
        ("memory of a node", _bytes(answer.worst_memory)),
        ("workers can take them in", _seconds(answer.fastest_return)),
        ("and everybody in", _seconds(answer.everybody_back)),
    )
    add(
        "Redis",
        ("commands", f"{_rate(answer.redis_commands)}, those in scripts included"),
        ("bandwidth", f"in {_bits(answer.redis_in)}, out {_bits(answer.redis_out)}"),
        ("CPU", f"{_percent(answer.redis_cpu)} of one core"),
        ("memory", f"{size(answer.redis_memory)} with 50 messages in every channel"),
        ("servers", _shards(answer)),
    )
    add(
        "PostgreSQL",
        ("commits", _rate(answer.commits)),
        ("CPU", f"{answer.postgres_cpu.value:.1f} cores used; buy {answer.postgres_cores}"),
        (
            "log (WAL)",
            f"{size(answer.wal.value)}/s, up to {size(answer.wal_most)}/s after a checkpoint",
        ),
        (
            "storage a year",
            (
                f"messages {size(answer.message_storage)}, audit {size(answer.audit_storage)}, "
                f"at {deployment.mean_share:.0%} of these rates"
            ),
        ),
        ("connections", f"{answer.postgres_connections:,}; max_connections above that"),
    )
    add(
        "load balancer",
        ("connections", f"{answer.load_balancer_connections:,}, half of them to clients"),
        (
            "ports to a node",
            (
                f"{answer.ports_per_node:,}: {answer.addresses_per_node} × {PORTS:,} "
                f"({WIDE_PORTS:,} each if widened)"
            ),
        ),
    )
    add(
        "kernel",
        ("files of a worker", f"{answer.files_per_worker:,} (LimitNOFILE)"),
        ("files of a balancer", f"{answer.load_balancer_connections + 1_000:,}"),
        ("somaxconn", "4,096 or more: whoever returns waits there"),
        ("nf_conntrack_max", f"{2 * answer.ports_per_node:,} on a node, if it tracks at all"),
    )
    if answer.addresses_per_node > 1:
        add("", ("ip_local_port_range", "1024 65535 on the balancer, or more addresses"))
    add(
        "full first",
        *(
            (
                each.what,
                (
                    f"{each.used:.0%} of it, {each.allowed:.0%} allowed: full at "
                    f"{number(float(f'{1 / each.used:.2g}'))} × this load"
                ),
            )
            for each in answer.saturations
            if each.used
        ),
    )
    add("rule", ("headroom", str(answer.headroom)))
    add("extrapolated", *(_split(text) for text in answer.extrapolated))
    return rows


def print_plan(answer: Answer, calibration: Calibration) -> None:
    deployment = answer.deployment
    table = Table(
        "", "", "",
        title=f"{deployment.clients:,} clients, {deployment.sends_per_second:,.0f} sends/s to "
        f"{deployment.fanout} streams each",
        caption=f"Measured {calibration.began} on {calibration.machine.get('cpu', '?')}, "
        f"{calibration.machine.get('cores', '?')} cores. In brackets: two standard errors of the "
        "fit.",
        show_header=False,
    )  # fmt: skip
    for place, row in enumerate(rows := plan_rows(answer)):
        table.add_row(*row, end_section=place + 1 < len(rows) and rows[place + 1][0] != "")
    _console().print(table)


def print_calibration(calibration: Calibration) -> None:
    console = _console()
    costs = Table("what one costs", "± two standard errors")
    for row in cost_rows(calibration):
        costs.add_row(*row)
    console.print(costs)
    verdict = Table("held out", f"within {WITHIN:.0%}", "mean error", "worst", "spread of the fit")
    for cells in verdict_rows(calibration):
        verdict.add_row(*cells)
    console.print(verdict)
    if calibration.steps:
        most = Table(*HIGHEST)
        for cells in highest_rows(calibration):
            most.add_row(*cells)
        console.print(most)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    if abs(value) >= 1_000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _rate(estimate: Estimate) -> str:
    return f"{number(estimate.value)} /s ({number(estimate.low)} to {number(estimate.high)})"


def _bytes(estimate: Estimate) -> str:
    return f"{size(estimate.value)} ({size(estimate.low)} to {size(estimate.high)})"


def _bits(estimate: Estimate) -> str:
    return f"{number(estimate.value * 8 / 1e6)} Mbit/s"


def size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"


def _seconds(seconds: float) -> str:
    if seconds == float("inf"):
        return "never, within the rule"
    return f"{number(seconds)} s" if seconds >= 1 else "under a second"


def _shards(answer: Answer) -> str:
    if answer.redis_shards.high == 1:
        return "1, with a replica"
    return f"{answer.redis_shards} in a cluster, each with a replica"


def _split(text: str) -> tuple[str, str]:
    what, _, rest = text.partition(": ")
    return what, rest
