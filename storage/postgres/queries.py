"""The statements of `queries.sql`, by name."""

import re
from importlib.resources import files

_NAMED = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(file: str) -> dict[str, str]:
    """The statements of a file of this package, by the names above them, without comments."""
    _, *parts = _NAMED.split((files("storage.postgres") / file).read_text("utf-8"))
    return {
        name: re.sub(r"^--.*\n", "", text, flags=re.MULTILINE).strip()
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


QUERIES = {name: text.encode() for name, text in load("queries.sql").items()}
