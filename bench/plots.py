"""The plots of docs/performance.md. Each title says what is to be seen."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed
from matplotlib import pyplot as plt

from bench.results import Results
from bench.scenarios import connect, fanout, idle, pairs
from bench.subjects import SUBJECTS

COLOURS = {
    "sottovoce": "#0b6e4f",
    "engine": "#35b37e",
    "nchan": "#4c566a",
    "better-sse": "#c2571a",
    "uvicorn": "#3b6fb6",
    "sse-starlette": "#8a5aa8",
    "hypercorn": "#a08a2c",
    "write-c": "#9aa0aa",
    "write-python": "#d0a0a0",
}
OURS = ("sottovoce", "engine")
PERCENTILES = (
    ("p50_ms", "p50", "#0b6e4f"),
    ("p99_ms", "p99", "#3b6fb6"),
    ("p999_ms", "p99.9", "#c2571a"),
)
SIZE = (8.0, 4.6)
DPI = 110


def draw(results: Results, folder: Path) -> list[Path]:
    """Every plot that has something to show; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    drawn = []
    for name, make in (
        ("fanout", _fanout),
        ("memory", _memory),
        ("latency", _latency),
        ("connect", _connect),
    ):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        if make(results, axes):
            path = folder / f"{name}.png"
            # Without the versions, the same figures make the same file.
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            drawn.append(path)
        plt.close(figure)
    return drawn


def _fanout(results: Results, axes: Any) -> bool:
    for subject in results.subjects(fanout.NAME):
        found = [
            (level, summary)
            for level in fanout.LEVELS
            if (
                summary := results.summary(
                    fanout.NAME, subject, fanout.case_of(level), "events_per_second"
                )
            )
        ]
        if found:
            axes.plot(
                [level for level, _ in found],
                [summary.median for _, summary in found],
                marker="o",
                markersize=4,
                linewidth=2.4 if subject in OURS else 1.4,
                linestyle="--" if subject.startswith("write-") else "-",
                color=COLOURS[subject],
                label=SUBJECTS[subject].label,
            )
    if not axes.lines:
        return False
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="streams on one channel",
        ylabel="events delivered per second",
    )
    main = fanout.case_of(fanout.MAIN)
    ours = results.median(fanout.NAME, "sottovoce", main, "events_per_second")
    nchan = results.median(fanout.NAME, "nchan", main, "events_per_second")
    axes.set_title(
        f"At 1,000 streams Sottovoce delivers {ours / nchan:.1f} × what nchan does"
        if ours and nchan
        else "Events delivered, by number of streams"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return True


def _memory(results: Results, axes: Any) -> bool:
    level = next(
        (
            case
            for case in (f"{idle.QUIET_AT} streams", "1000 streams")
            if results.median(idle.NAME, "sottovoce", case, "rss_kb") is not None
        ),
        None,
    )
    if level is None:
        return False
    rows = [
        (subject, rss, results.median(idle.NAME, subject, level, "kernel_kb") or 0.0)
        for subject in results.subjects(idle.NAME)
        if (rss := results.median(idle.NAME, subject, level, "rss_kb")) is not None
    ]
    rows.sort(key=lambda row: -row[1])
    labels = [SUBJECTS[subject].label for subject, _, _ in rows]
    axes.barh(labels, [rss for _, rss, _ in rows], color=[COLOURS[row[0]] for row in rows])
    axes.barh(
        labels,
        [max(0.0, kernel) for _, _, kernel in rows],
        left=[rss for _, rss, _ in rows],
        color="#dddddd",
        label="kernel, both ends of the connection",
    )
    for place, (_, rss, _) in enumerate(rows):
        axes.text(rss / 2, place, f"{rss:.1f}", ha="center", va="center", color="white")
    count = int(level.split()[0])
    axes.set(xlabel=f"kB per quiet stream, at {count:,} streams")
    ours = next(rss for subject, rss, _ in rows if subject == "sottovoce")
    axes.set_title(f"A quiet authenticated stream takes {ours:.1f} kB of the server's memory")
    axes.legend(fontsize=8, frameon=False)
    return True


def _latency(results: Results, axes: Any) -> bool:
    cases = [
        case
        for case in pairs.LOADS
        if results.median(pairs.NAME, "sottovoce", case, "p50_ms") is not None
    ]
    if not cases:
        return False
    for value, label, colour in PERCENTILES:
        found = [results.summary(pairs.NAME, "sottovoce", case, value) for case in cases]
        summaries = [summary for summary in found if summary is not None]
        axes.errorbar(
            [pairs.LOADS[case] * 100 for case in cases],
            [summary.median for summary in summaries],
            yerr=[
                [summary.median - summary.low for summary in summaries],
                [summary.high - summary.median for summary in summaries],
            ],
            marker="o",
            capsize=3,
            color=colour,
            label=label,
        )
    axes.set(
        yscale="log",
        xlabel="load, % of the most durable sends per second",
        ylabel="from sending to delivery, ms",
    )
    half = results.median(pairs.NAME, "sottovoce", "50 % of the maximum", "p50_ms")
    rate = results.median(pairs.NAME, "sottovoce", "50 % of the maximum", "sends_per_second")
    axes.set_title(
        f"At {rate:,.0f} durable sends/s, half of the most, half arrive within {half:.1f} ms"
        if half and rate
        else "From sending to delivery"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    return True


def _connect(results: Results, axes: Any) -> bool:
    case = "new streams"
    rows = [
        (subject, rate)
        for subject in results.subjects(connect.NAME)
        if (rate := results.median(connect.NAME, subject, case, "streams_per_second")) is not None
    ]
    if not rows:
        return False
    rows.sort(key=lambda row: row[1])
    bars = axes.barh(
        [SUBJECTS[subject].label for subject, _ in rows],
        [rate for _, rate in rows],
        color=[COLOURS[subject] for subject, _ in rows],
    )
    axes.bar_label(bars, labels=[f"{rate:,.0f}" for _, rate in rows], padding=3)
    axes.set(xlabel="new streams per second")
    ours = dict(rows).get("sottovoce")
    axes.set_title(
        f"{ours:,.0f} new streams/s with token, access check and 20 messages of history;\n"
        "the others open theirs without any of it"
        if ours
        else "New streams per second"
    )
    return True
