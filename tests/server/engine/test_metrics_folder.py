"""The metrics' folder goes with its owner, and what a killed one left goes with the next."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import structlog.testing

from server.engine.metrics_folder import MARK, PREFIX, metrics_folder

HOLD = """
import subprocess, sys
from server.engine.metrics_folder import metrics_folder
with metrics_folder() as folder:
    worker = [sys.executable, "-c", "print(1, flush=True); input()"]
    subprocess.run(worker, pass_fds=[folder.lock])
"""


@pytest.fixture
def temporary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def folders(temporary: Path) -> list[Path]:
    return sorted(temporary.glob(f"{PREFIX}*"))


def test_a_folder_ends_with_its_block(temporary: Path):
    with metrics_folder() as made:
        assert made is not None and folders(temporary) == [made.path]
        (made.path / "counter_0.db").touch()
    assert folders(temporary) == []


def test_a_folder_stays_while_its_owner_or_a_worker_lives_and_goes_with_the_next_start(
    temporary: Path,
):
    environ = os.environ | {"TMPDIR": str(temporary)}
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None and owner.stdin is not None
    with owner, owner.stdout:
        assert owner.stdout.readline() == b"1\n"
        (left,) = folders(temporary)
        with metrics_folder():
            assert left in folders(temporary), "its owner lives"
        owner.kill()
        owner.wait()
        with metrics_folder():
            assert left in folders(temporary), "its worker lives"
        owner.stdin.close()
        owner.stdout.read()  # to the end: the worker's
    with metrics_folder() as made:
        assert made is not None and folders(temporary) == [made.path]


def test_a_folder_of_which_nothing_is_known_is_left_alone(temporary: Path):
    unknown = temporary / f"{PREFIX}unknown"
    unknown.mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARK).touch()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    with metrics_folder():
        pass
    assert unknown.exists()
    assert (elsewhere / MARK).exists()


def test_without_any_place_for_it_there_is_none_and_that_is_logged(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with structlog.testing.capture_logs() as logs, metrics_folder() as made:
        assert made is None
    assert [(line["event"], line["reason"]) for line in logs] == [("metrics_not_shared", "ENOENT")]
