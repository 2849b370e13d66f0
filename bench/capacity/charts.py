"""The charts of docs/capacity.md. Each title says what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed
from matplotlib import pyplot as plt

from bench.capacity.calibration import Calibration
from bench.capacity.model import check
from bench.capacity.pace import calm
from bench.capacity.search import highest
from bench.capacity.show import WITHIN

SIZE = (8.0, 4.6)
DPI = 110
GREEN, BLUE, ORANGE, GREY = "#0b6e4f", "#3b6fb6", "#c2571a", "#9aa0aa"
PALE = "#a9d3c3"
MEGABYTE = 1e6
CHECKED = (("worker cpu", "workers' CPU", GREEN), ("postgres cpu", "PostgreSQL's CPU", BLUE),
           ("redis cpu", "Redis' CPU", ORANGE))  # fmt: skip


def draw(calibration: Calibration, folder: Path) -> list[Path]:
    """Every chart that has something to show; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    charts: tuple[tuple[str, Callable[[Calibration, Any], bool]], ...] = (
        ("memory", _memory),
        ("knee", _knee),
        ("fault", _fault),
        ("predicted", _predicted),
    )
    drawn = []
    for name, make in charts:
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        if make(calibration, axes):
            path = folder / f"capacity-{name}.png"
            # Without the versions, the same figures make the same file.
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            drawn.append(path)
        plt.close(figure)
    return drawn


def _memory(calibration: Calibration, axes: Any) -> bool:
    fit = calibration.model.fits["rss"]
    points = [each for each in calibration.measured if not each.values["most connects"]]
    if not points:
        return False
    for workers, colour, marker in ((1, GREEN, "o"), (2, BLUE, "s")):
        mine = [each for each in points if each.load.workers == workers]
        if not mine:
            continue
        axes.plot(
            [each.values["streams"] for each in mine],
            [each.values["rss"] / MEGABYTE for each in mine],
            marker,
            color=colour,
            markersize=5,
            alpha=0.7,
            label=f"measured, {_workers(workers)}",
        )
        most = max(each.values["streams"] for each in mine)
        base, slope = fit.cost("workers").value * workers, fit.cost("streams").value
        axes.plot(
            [0, most],
            [base / MEGABYTE, (base + slope * most) / MEGABYTE],
            color=colour,
            linewidth=1.4,
            label=f"fit, {_workers(workers)}",
        )
    axes.set(xlabel="open streams", ylabel="memory of the workers (RSS), MB", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    stream, worker = fit.cost("streams"), fit.cost("workers")
    axes.set_title(
        f"A stream takes {stream.value / 1000:.1f} kB of a worker, "
        f"which has {worker.value / MEGABYTE:.0f} MB without any"
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return True


def _knee(calibration: Calibration, axes: Any) -> bool:
    if not calibration.steps:
        return False
    titles = []
    limit = calibration.objectives.p99_ms
    for workers, colour in ((1, GREEN), (2, BLUE)):
        steps = sorted(
            (step for step in calibration.steps if step.workers == workers),
            key=lambda step: step.sends,
        )
        if not steps:
            continue
        for value, style, label in (("p50_ms", "--", "half arrive"), ("p99_ms", "-", "99 %")):
            found = [(s.sends, s.values[value]) for s in steps if value in s.values]
            axes.plot(
                [sends for sends, _ in found],
                [milliseconds for _, milliseconds in found],
                style,
                marker="o",
                markersize=4,
                color=colour,
                label=f"{label} within, {_workers(workers)}",
            )
        missed = [s for s in steps if s.missed and "p99_ms" in s.values]
        axes.plot(
            [s.sends for s in missed],
            [s.values["p99_ms"] for s in missed],
            "x",
            markersize=9,
            markeredgewidth=2,
            color=colour,
        )
        most = highest(calibration.steps, workers, steps[0].streams)
        titles.append(f"{most:,.0f} sends/s ({_workers(workers)})")
    axes.axhline(limit, color=ORANGE, linewidth=1)
    axes.text(axes.get_xlim()[0], limit, f" objective: p99 {limit:.0f} ms", color=ORANGE,
              ha="left", va="bottom", fontsize=8)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="durable sends per second that were due, each to two streams",
        ylabel="from due to delivered, ms",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    streams = calibration.steps[0].streams
    axes.set_title(
        f"With {streams:,} streams, delivery keeps its objectives up to\n" + " and ".join(titles)
        + "; × is where one was missed"
    )  # fmt: skip
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return True


def _fault(calibration: Calibration, axes: Any) -> bool:
    fault = calibration.fault
    if fault is None:
        return False
    size = fault.bucket_seconds
    times = [(place + 0.5) * size for place in range(len(fault.delivered))]
    rates = [count / size for count in fault.delivered]
    axes.bar(times, rates, width=size, color=PALE, linewidth=0)
    axes.axvspan(fault.killed, fault.back, color=ORANGE, alpha=0.18, linewidth=0)
    top = max(rates) * 1.32
    axes.set(
        xlabel=f"seconds; each bar is {size * 1000:.0f} ms",
        ylabel="deliveries per second",
        ylim=(0, top),
        xlim=(0, times[-1] + size / 2),
    )
    for moment, text in ((fault.killed, "kill -9 of Valkey"), (fault.back, "started, empty")):
        axes.axvline(moment, color=ORANGE, linewidth=1.4)
        axes.text(moment + 0.2, top * 0.985, text, color=ORANGE, va="top", fontsize=9)
    second = axes.twinx()
    second.plot(times, fault.p99_ms, color=BLUE, linewidth=1.2)
    second.set_ylabel("p99 from due to delivered, ms", color=BLUE)
    second.set_ylim(0, max(fault.p99_ms) * 1.15)
    second.spines["right"].set_visible(True)
    missing = fault.expected - fault.received
    worst = max(fault.p99_ms)
    axes.set_title(
        f"Valkey is killed and comes back empty: of {fault.expected:,} deliveries "
        f"{missing or 'none'} went missing,\n"
        f"p99 is {worst:,.0f} ms at the worst ({_workers(fault.workers)}, "
        f"{fault.sends:,.0f} sends/s)"
    )
    return True


def _predicted(calibration: Calibration, axes: Any) -> bool:
    quantities = [quantity for quantity, _, _ in CHECKED]
    windows = calm(calibration.measured)
    fitted = check(calibration.model, windows, quantities, held_out=False)
    held = check(calibration.model, windows, quantities, held_out=True)
    if not held:
        return False
    every = [each for each in (*fitted, *held) if each.measured > 0]
    low = min(min(each.measured, each.predicted.value) for each in every) * 0.8
    high = max(max(each.measured, each.predicted.value) for each in every) * 1.25
    axes.fill_between(
        [low, high],
        [low * (1 - WITHIN), high * (1 - WITHIN)],
        [low * (1 + WITHIN), high * (1 + WITHIN)],
        color="#e8e8e8",
        linewidth=0,
        label=f"within {WITHIN:.0%}",
    )
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    for quantity, label, colour in CHECKED:
        for checks, marker, size, name in (
            (fitted, ".", 5, None),
            (held, "D", 6, f"{label}, held out"),
        ):
            mine = [each for each in checks if each.quantity == quantity]
            axes.plot(
                [each.measured for each in mine],
                [each.predicted.value for each in mine],
                marker,
                markersize=size,
                color=colour,
                alpha=0.35 if name is None else 1.0,
                linestyle="none",
                label=name,
            )
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(low, high),
        xlabel="measured, cores", ylabel="predicted from the load alone, cores",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    cpu = [abs(each.off) for each in held if each.quantity == "worker cpu"]
    axes.set_title(
        f"The workers' CPU of {sum(off <= WITHIN for off in cpu)} of {len(cpu)} held-out loads is "
        f"predicted within {WITHIN:.0%};\nthe worst is off by {max(cpu):.0%} "
        "(small dots: the points of the fit)"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return True


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
