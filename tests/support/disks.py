"""Disks that are full or take no writes, seen by one process alone."""

from pathlib import Path


def on_disk_of(kilobytes: int, folder: Path, command: list[str]) -> list[str]:
    """`command`, for which `folder` is a disk of that size. Only it and its children see that
    disk, which goes away with them; nobody needs to be root."""
    return _mounted(f"size={kilobytes}k", folder, command)


def on_read_only_disk(folder: Path, command: list[str]) -> list[str]:
    """`command`, for which `folder` is on a disk that takes no writes."""
    return _mounted("ro", folder, command)


def _mounted(options: str, folder: Path, command: list[str]) -> list[str]:
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    space = ["unshare", "--mount", "--map-root-user"]
    return [*space, "sh", "-c", script, "sh", options, str(folder), *command]
