"""The environment of a worker: its own variables, and those of an env file over them."""

from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values


def with_env_file(environ: Mapping[str, str], path: Path | None) -> dict[str, str]:
    """`environ` with the file's values over it, so that a reload of the file can change them.

    A `$` in a value stays a `$`: keys and passwords have them.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    values = dict(environ)
    if path is not None:
        with path.open(encoding="utf-8") as file:
            read = dotenv_values(stream=file, interpolate=False)
        values |= {name: value for name, value in read.items() if value is not None}
    return values
