"""The tables in README.md and docs/ that say what the code says: made from it.

`make docs` writes them between their markers; a test fails while they differ.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from protocol.closing import CLOSING_RULES
from protocol.problems import PROBLEMS
from server.routes import ROUTES
from server.settings import describe_settings
from storage.postgres.requirements import IDENTIFIERS, PEOPLE, THEIRS


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def settings_table() -> str:
    rows = (
        (f"`{name}`", default, unit, reason) for name, default, unit, reason in describe_settings()
    )
    return _table(("Variable", "Default", "Unit", "What and why"), rows)


def problems_table() -> str:
    rows = ((str(kind.status), f"`{code}`", kind.sentence) for code, kind in PROBLEMS.items())
    return _table(("Status", "`code`", "`error`"), rows)


def closing_table() -> str:
    rows = (
        (
            f"`{reason}`",
            "yes" if rule.reconnect else "no",
            str(rule.next_status or ""),
            rule.meaning,
        )
        for reason, rule in CLOSING_RULES.items()
    )
    return _table(("`reason`", "`reconnect`", "Next request gets", "Meaning"), rows)


def routes_table() -> str:
    return _table(("Method", "Path"), ((route.method, f"`{route.path}`") for route in ROUTES))


def requirements_table() -> str:
    needed: dict[str, list[str]] = {}
    for need in (*PEOPLE, *THEIRS):
        needed.setdefault(need.table, []).append(f"`{need.column}`")
    needed["chat_channels"].append(" or ".join(f"`{name}`" for name in IDENTIFIERS))
    return _table(
        ("Table", "Columns that must be there"),
        ((f"`{table}`", ", ".join(columns)) for table, columns in needed.items()),
    )


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "problems": problems_table,
    "closing": closing_table,
    "routes": routes_table,
    "requirements": requirements_table,
}
DOCUMENTS = ("README.md", "docs/protocol.md", "docs/how-to/take-over.md")


def fill(text: str) -> str:
    """`text` with each table between its markers as it should be."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{start}.*?{end}", re.DOTALL)
        text = pattern.sub(lambda _, t=table, s=start, e=end: f"{s}\n{t()}\n{e}", text)  # type: ignore[misc]
    return text


def main() -> None:
    for name in DOCUMENTS:
        path = Path(name)
        path.write_text(fill(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
