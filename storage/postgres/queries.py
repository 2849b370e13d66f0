"""The statements of `queries.sql`, by name."""

import re
from importlib.resources import files

_NAMED = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def _load() -> dict[str, bytes]:
    _, *parts = _NAMED.split((files("storage.postgres") / "queries.sql").read_text("utf-8"))
    return {
        name: re.sub(r"^--.*\n", "", text, flags=re.MULTILINE).strip().encode()
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


QUERIES = _load()
