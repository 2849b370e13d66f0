"""What a run has shown: on one screen, and as JSON beside Locust's own files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from loadtest.course import Mark
from loadtest.objectives import Verdict

WIDTH = 100
NOTHING = "–"
BLAME_NOTE = "the times above are the generator's too, and say little of the server"


def render(
    scenario: str, figures: Mapping[str, float], verdict: Verdict, marks: Sequence[Mark] = ()
) -> Group:
    """A screen of 24 lines by 100 characters, if not much happened."""
    seconds = figures.get("seconds", 0.0)
    told = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    told.add_row(
        "streams",
        f"{_count(figures, 'streams_open_most')} open at most; "
        f"{_count(figures, 'connects')} opened, {_count(figures, 'reconnects')} of them again; "
        f"{_count(figures, 'ended_by_server')} ended by the server",
    )
    told.add_row(
        "messages",
        f"{_count(figures, 'sends')} sent ({figures.get('sends', 0) / max(1, seconds):,.0f}/s), "
        f"{_count(figures, 'deliveries')} shown; of {_count(figures, 'expected')} owed "
        f"{figures.get('delivery_percent', 100):.4f} % delivered, {_count(figures, 'lost')} lost",
    )
    told.add_row(
        "wrong",
        ", ".join(
            f"{_count(figures, name)} {name.replace('_', ' ')}"
            for name in (
                "duplicates", "gaps", "reorderings", "leaks", "lost_heartbeats", "resets",
            )
        ),
    )  # fmt: skip
    told.add_row(
        "generator",
        f"{_number(figures, 'generator_cpu_percent')} % of a core "
        f"(at most {_number(figures, 'generator_cpu_most_percent')}), "
        f"{_number(figures, 'generator_memory_mb')} MB, "
        f"its loop {_number(figures, 'generator_lag_p99_ms')} ms late at p99",
    )
    if "server_cpu_percent" in figures:
        told.add_row(
            "server",
            f"{_number(figures, 'server_cpu_percent')} % of a core, "
            f"{_number(figures, 'server_memory_mb')} MB at most, in all its workers",
        )
    times = Table(box=None, padding=(0, 2, 0, 0))
    times.add_column("milliseconds")
    for label in ("p50", "p99", "p99.9", "most"):
        times.add_column(label, justify="right")
    for name in ("connect", "first_event", "reconnect", "send", "delivery"):
        if f"{name}_p50_ms" in figures:
            keys = (f"{name}_{label}_ms" for label in ("p50", "p99", "p999", "max"))
            times.add_row(name.replace("_", " "), *(_number(figures, key) for key in keys))
    lines: list[Table | Text] = [
        Text(f"{scenario}, {seconds:.0f} s", style="bold"), told, Text(), times, Text(),
    ]  # fmt: skip
    lines += [Text(f"{mark.at:.0f} s: {mark.what}") for mark in marks]
    for judged in verdict.judged:
        if not judged.met:
            value = "not measured" if judged.value is None else f"{judged.value:,.6g}"
            lines.append(Text(f"MISSED  {judged.objective}: it was {value}", style="bold red"))
    if verdict.generator:
        limit = f"THE GENERATOR WAS THE LIMIT: {verdict.generator}; {BLAME_NOTE}"
        lines.append(Text(limit, style="bold yellow"))
    met = sum(judged.met for judged in verdict.judged)
    lines.append(
        Text(f"{met} of {len(verdict.judged)} objectives met", style="green" if met else "red")
    )
    return Group(*lines)


def show(
    scenario: str, figures: Mapping[str, float], verdict: Verdict, marks: Sequence[Mark]
) -> None:
    Console(width=WIDTH, highlight=False).print(render(scenario, figures, verdict, marks))


def write(
    file: Path,
    scenario: str,
    figures: Mapping[str, float],
    verdict: Verdict,
    marks: Sequence[Mark],
) -> None:
    """
    Raises:
        OSError
    """
    told = {
        "scenario": scenario,
        "figures": dict(figures),
        "objectives": [
            {"objective": str(each.objective), "value": each.value, "met": each.met}
            for each in verdict.judged
        ],
        "marks": [mark._asdict() for mark in marks],
        "generator_was_the_limit": verdict.generator,
        "exit_code": verdict.exit_code,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1) + "\n")


def _count(figures: Mapping[str, float], name: str) -> str:
    return f"{figures.get(name, 0):,.0f}"


def _number(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:,.0f}" if name in figures else NOTHING
