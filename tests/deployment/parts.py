"""Where the parts are that `make parts` installs. One that is missing is an error that says so."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
NPM = ROOT / ".parts"
"""A folder for each folder of `tests/deployment/npm`, with its packages installed."""
DEBIAN = (Path("/usr/sbin"), Path("/usr/lib/postgresql/15/bin"))
"""Where Debian puts programs that an ordinary user's PATH may not have."""


class PartMissing(Exception):
    """A part of a deployment is not installed on this machine."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not installed: run `make parts` as root (Debian)")


def program(name: str) -> str:
    """The path of a program from Debian.

    Raises:
        PartMissing: it is not installed.
    """
    for found in (shutil.which(name), *(shutil.which(name, path=str(at)) for at in DEBIAN)):
        if found:
            return found
    raise PartMissing(name)


def npm_folder(name: str) -> Path:
    """A folder with the npm packages of `tests/deployment/npm/<name>`.

    Raises:
        PartMissing: they are not installed.
    """
    folder = NPM / name
    if not (folder / "node_modules").is_dir():
        raise PartMissing(f"npm's {name}")
    return folder
