"""One small measurement of the real thing: does it all fit together?"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.__main__ import _guarded
from bench.client import Refused
from bench.results import Sample
from bench.scenarios import fanout, requests
from bench.subjects import SUBJECTS, engine, get


@pytest.fixture(autouse=True)
def _work_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.subjects.WORK", Path(tmp_path))


def test_a_fan_out_counts_every_event_of_every_stream():
    few, more = fanout.measure("write-python", 1, 0, [(20, 4), (30, 16)], 0.2)
    assert (few.case, more.case) == ("20 streams, 4 at once", "30 streams")
    for sample in (few, more):
        assert sample.values["events_per_second"] > 1000
        assert sample.values["bytes_per_event"] == pytest.approx(111, abs=0.5)
        assert sample.values["lost"] == 0
        # Busy time per second is time per event times events per second.
        busy = sample.values["cpu_us_per_event"] * sample.values["events_per_second"] / 1e6
        assert busy == pytest.approx(sample.values["server_busy"])


def test_our_engine_runs_the_peers_application():
    (sample,) = requests.measure("engine", 1, 0, 0.2)
    assert sample.values["posts_per_second"] > 50


def test_our_engine_streams_it_too():
    (sample,) = fanout.measure("engine", 1, 0, [(5, 16)], 0.2)
    assert sample.values["events_per_second"] > 100
    assert sample.values["lost"] == 0


def test_a_server_ends_with_its_block():
    with SUBJECTS["write-python"].start(1) as server:
        process = server._processes[0]
        assert process.is_running()
    assert not process.is_running()


def test_every_subject_says_what_it_lacks_or_nothing():
    for subject in SUBJECTS.values():
        assert isinstance(subject.missing(), str)
    assert SUBJECTS["write-python"].missing() == ""
    assert engine is SUBJECTS["engine"].start


def test_a_request_with_a_token_has_it_in_a_header():
    assert b"Authorization: Bearer secret\r\n" in get("/x", "secret")
    assert b"Authorization" not in get("/x")


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on():
    first = Sample(scenario="s", subject="s", case="c", values={})

    def measured() -> Iterator[Sample]:
        yield first
        raise Refused("no more")

    failed: list[str] = []
    assert list(_guarded("this", measured(), failed)) == [first]
    assert failed == ["this: Refused no more"]
