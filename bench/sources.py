"""Copies of the sources with something changed in them: servers that lack a safeguard or have a
bug, for those who want to know whether a measurement would notice."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.subjects import ROOT


class Patch(NamedTuple):
    """A text that is in a file once, and what takes its place."""

    file: str
    old: str
    new: str


class Broken(Exception):
    """A mutant could not be made, or its run did not come to an end."""


@contextmanager
def copied(packages: Sequence[str], patches: Sequence[Patch], *, work: Path) -> Iterator[Path]:
    """A copy of the packages with the patches applied, in a folder below `work`, while the block
    lasts.

    Raises:
        Broken: see `apply`.
    """
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="mutant-", dir=work, ignore_cleanup_errors=True
    ) as folder:
        root = Path(folder)
        root.chmod(0o755)  # PostgreSQL may run as somebody else
        for package in packages:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, root / package, ignore=ignored)
        apply(patches, root)
        yield root


def apply(patches: Sequence[Patch], root: Path) -> None:
    """Change the sources in `root`.

    Raises:
        Broken: a text is not there, or more than once.
    """
    for patch in patches:
        path = root / patch.file
        text = path.read_text()
        if text.count(patch.old) != 1:
            raise Broken(f"{patch.file} has {patch.old!r} {text.count(patch.old)} times, not once")
        path.write_text(text.replace(patch.old, patch.new))
