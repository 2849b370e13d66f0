"""docs/performance.md: its generated parts and its plots. What is between the markers is ours
to replace; everything else there is written by hand.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.results import Results, Run
from bench.scenarios import connect, fanout, idle, pairs, requests
from bench.statistics import Summary
from bench.subjects import SUBJECTS
from bench.verdict import verdict

PAGE = "performance.md"


class NoSuchPart(ValueError):
    """The page lacks the markers of a part that is to be filled."""


def fill(page: str, parts: dict[str, str]) -> str:
    """Put each text between its markers `<!-- bench: NAME -->` and `<!-- end -->`.

    Raises:
        NoSuchPart: the page does not have them.
    """
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not (found := pattern.search(page)):
            raise NoSuchPart(name)
        page = f"{page[: found.start()]}{found[1]}{text}\n{found[2]}{page[found.end() :]}"
    return page


def write_report(run: Run, docs: Path) -> list[Path]:
    """Fill the page and draw the plots; which files that made."""
    from bench.plots import draw  # matplotlib: not for those who only measure

    results = Results(run.samples)
    page = docs / PAGE
    filled = fill(page.read_text("utf-8"), parts(run, results))
    written = draw(results, docs / "plots")
    page.write_text(filled, "utf-8")
    return [page, *written]


def parts(run: Run, results: Results) -> dict[str, str]:
    return {
        "verdict": _verdict(results),
        "machine": _machine(run),
        "fanout": _fanout(results, 1),
        "fanout-two": _fanout(results, 2),
        "pairs": _pairs(results),
        "idle": _idle(results),
        "cost": _cost(results),
        "connect": _connect(results),
        "requests": _requests(results),
        "client": _client(results),
        "fanout-cost": _fanout_cost(results),
    }


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    found = list(rows)
    if not found:
        return "Not measured in this run."
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in found]
    return "\n".join(lines)


def _show(summary: Summary | None, form: str = ",.0f") -> str:
    """Median, and the spread of the rounds where there is one."""
    if summary is None:
        return ""
    text = format(summary.median, form)
    if summary.rounds == 1:
        return text
    return f"{text} <sub>{summary.low:{form}}–{summary.high:{form}}</sub>"


def _label(subject: str) -> str:
    label = SUBJECTS[subject].label
    return f"**{label}**" if subject in ("sottovoce", "engine") else label


def _verdict(results: Results) -> str:
    signs = {True: "reached", False: "**short**", None: ""}
    return _table(
        ["", "at least", "reached", "", "reach for"],
        (
            [line.what, line.least, line.reached or "not measured", signs[line.met], line.hoped]
            for line in verdict(results)
        ),
    )


def _machine(run: Run) -> str:
    kind = "A quick run" if run.quick else f"{run.rounds} rounds"
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    lines = [f"{kind}, begun {run.began}. {facts}."]
    lines += [
        f"Left out: {SUBJECTS[name].label if name in SUBJECTS else name} ({why})."
        for name, why in run.absent.items()
    ]
    lines += [f"Given up: {failure}." for failure in run.failed]
    lines += [
        f"Lost: {sample.values['lost']:.2%} of {sample.scenario}, {sample.subject}, {sample.case},"
        f" round {sample.round + 1}."
        for sample in run.samples
        if sample.values.get("lost")
    ]
    return "\n\n".join(lines)


def _fanout(results: Results, processes: int) -> str:
    cases = results.cases(fanout.NAME, processes=processes)

    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(fanout.NAME):
            rates = [
                results.summary(
                    fanout.NAME, subject, case, "events_per_second", processes=processes
                )
                for case in cases
            ]
            if not any(rates):
                continue
            size = results.median(
                fanout.NAME,
                subject,
                fanout.case_of(fanout.MAIN),
                "bytes_per_event",
                processes=processes,
            )
            yield [_label(subject), *map(_show, rates), f"{size:.0f}" if size else ""]

    return _table(["events/s", *cases, "bytes/event"], rows())


def _pairs(results: Results) -> str:
    def rows() -> Iterator[list[str]]:
        for processes in (1, 2):
            for case in results.cases(pairs.NAME, processes=processes):
                yield [
                    str(processes),
                    case,
                    *(
                        _show(
                            results.summary(
                                pairs.NAME, "sottovoce", case, value, processes=processes
                            ),
                            form,
                        )
                        for value, form in (
                            ("sends_per_second", ",.0f"),
                            ("p50_ms", ".1f"),
                            ("p99_ms", ".1f"),
                            ("p999_ms", ".1f"),
                        )
                    ),
                ]

    return _table(["processes", "load", "sends/s", "p50 ms", "p99 ms", "p99.9 ms"], rows())


def _idle(results: Results) -> str:
    levels = [case for case in results.cases(idle.NAME) if case.endswith(" streams")]
    levels = [case for case in levels if not case.startswith("cost")]

    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(idle.NAME):
            row = [_label(subject)]
            for case in levels:
                rss = results.summary(idle.NAME, subject, case, "rss_kb")
                kernel = results.summary(idle.NAME, subject, case, "kernel_kb")
                row.append(f"{_show(rss, '.1f')} + {_show(kernel, '.1f')}" if rss else "")
            yield row

    text = _table(["kB per stream: RSS + kernel", *levels], rows())
    for case in levels:
        cores = results.summary(idle.NAME, "sottovoce", case, "quiet_cores")
        if cores is not None:
            text += (
                f"\n\n{case} that are quiet take {cores.median * 100:.1f} % of a core: heartbeats, "
                "looks at access, and all else that a worker does."
            )
    return text


def _cost(results: Results) -> str:
    def rows() -> Iterator[list[str]]:
        for level in idle.COST_LEVELS:
            case = idle.COST.format(level)
            cpu = results.summary(idle.NAME, "sottovoce", case, "cpu_us_per_event")
            if cpu is not None:
                memory = results.summary(idle.NAME, "sottovoce", f"{level} streams", "rss_kb")
                yield [f"{level:,}", _show(cpu, ".0f"), _show(memory, ".1f")]

    return _table(["open streams", "CPU µs per delivered event", "RSS kB per stream"], rows())


def _connect(results: Results) -> str:
    cases = results.cases(connect.NAME)
    storms = [case for case in cases if case.startswith("storm")]

    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(connect.NAME):
            row = [_label(subject)]
            row += [
                _show(results.summary(connect.NAME, subject, case, "streams_per_second"))
                for case in ("cold", "from Redis", "new streams")
            ]
            for case in storms:
                row += [
                    _show(results.summary(connect.NAME, subject, case, "seconds"), ".1f"),
                    _show(results.summary(connect.NAME, subject, case, "p50_ms"), ",.0f"),
                    _show(results.summary(connect.NAME, subject, case, "p99_ms"), ",.0f"),
                    _show(results.summary(connect.NAME, subject, case, "turned_away"), ".0%"),
                ]
            yield row

    head = ["", "cold /s", "from Redis /s", "new streams /s"]
    for case in storms:
        head += [f"{case}: seconds", "p50 ms", "p99 ms", "turned away"]
    return _table(head, rows())


def _requests(results: Results) -> str:
    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(requests.NAME):
            yield [
                _label(subject),
                *(
                    _show(
                        results.summary(
                            requests.NAME,
                            subject,
                            requests.CASE,
                            "posts_per_second",
                            processes=processes,
                        )
                    )
                    for processes in (1, 2)
                ),
            ]

    return _table(["POSTs/s", "one process", "two"], rows())


def _client(results: Results) -> str:
    case = fanout.case_of(fanout.MAIN)

    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(fanout.NAME):
            yield [
                _label(subject),
                _show(results.summary(fanout.NAME, subject, case, "events_per_second")),
                *(
                    _show(results.summary(fanout.NAME, subject, case, value), ".2f")
                    for value in ("server_busy", "client_busy")
                ),
            ]

    return _table(["1,000 streams", "events/s", "server, cores", "client, of its core"], rows())


def _fanout_cost(results: Results) -> str:
    cases = [fanout.case_of(fanout.MAIN, count) for count in sorted(fanout.MAIN_IN_FLIGHT)]

    def rows() -> Iterator[list[str]]:
        for subject in results.subjects(fanout.NAME):
            yield [
                _label(subject),
                *(
                    _show(results.summary(fanout.NAME, subject, case, "cpu_us_per_event"), ".1f")
                    for case in cases
                ),
            ]

    return _table(["server's CPU µs per event", *cases], rows())
