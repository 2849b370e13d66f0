"""What a worker counts: on a disk without room nothing is lost but the view of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from storage.metric_files import FOLDER, KINDS, NUMBER
from tests.support.disks import on_disk_of, on_read_only_disk
from tests.support.running import clean_environment

COUNT = """
import os, sys
from server.metrics import REQUEST_SECONDS, SENDS, STREAMS_OPEN
from storage.metrics import NOT_SHARED
for number in range(int(sys.argv[1])):
    REQUEST_SECONDS.labels(f"route{number}", "200").observe(0.1)
    SENDS.labels("stored").inc()
STREAMS_OPEN.set(3)
print(NOT_SHARED, SENDS.labels("stored")._value.get())
"""
"""A worker's counting; there are no 300 routes, but many labels fill a file as well."""


def count(folder: Path, labels: int, *, kilobytes: int | None = None, number: int = 0) -> str:
    """What it prints; its log comes before that."""
    command = [sys.executable, "-c", COUNT, str(labels)]
    if kilobytes == 0:
        command = on_read_only_disk(folder, command)
    elif kilobytes is not None:
        command = on_disk_of(kilobytes, folder, command)
    environ = clean_environment({FOLDER: str(folder), NUMBER: str(number)})
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), "SIGBUS is -7"
    return done.stdout


def shown(folder: Path, name: str) -> float:
    """One value of all workers together, as a scrape has it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    lines = generate_latest(registry).decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(("kilobytes", "reason"), [(64, "ENOSPC"), (0, "EROFS")])
def test_without_room_for_its_files_a_worker_counts_in_memory(
    folder: Path, kilobytes: int, reason: str
):
    assert count(folder, 5, kilobytes=kilobytes) == f"{reason} 5.0\n"


def test_a_disk_that_fills_up_later_ends_no_worker(folder: Path):
    room = len(KINDS) * 64
    *logged, printed = count(folder, 300, kilobytes=room).splitlines()
    assert printed == "None 300.0"
    assert len(logged) == 1 and "metrics_incomplete" in logged[0] and "ENOSPC" in logged[0]


def test_every_block_of_a_file_is_reserved_also_of_one_that_grew(folder: Path):
    count(folder, 300)
    files = sorted(file.name for file in folder.iterdir())
    assert files == sorted(f"{kind}_0.db" for kind in KINDS), "each is reserved at the start"
    assert (folder / "histogram_0.db").stat().st_size > 64 * 1024
    for file in folder.iterdir():
        assert file.stat().st_blocks * 512 >= file.stat().st_size, "a hole is a SIGBUS in waiting"


def test_the_next_worker_goes_on_in_the_files_of_one_that_died(folder: Path):
    count(folder, 5)
    count(folder, 5, number=1)
    mark_process_dead(0, str(folder))  # type: ignore[no-untyped-call]
    assert shown(folder, "sottovoce_sends_total") == 10
    assert shown(folder, "sottovoce_streams_open ") == 3, "those of the dead are none"
    count(folder, 5)
    assert shown(folder, "sottovoce_sends_total") == 15
    assert shown(folder, "sottovoce_request_seconds_count") == 15
    assert shown(folder, "sottovoce_streams_open ") == 6
    assert len(list(folder.iterdir())) == 2 * len(KINDS)


def test_a_version_is_told_once_however_many_workers_there_are(folder: Path):
    count(folder, 1)
    count(folder, 1, number=1)
    assert shown(folder, "sottovoce_build_info{") == 1
