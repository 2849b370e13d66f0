"""What makes a locustfile one of ours: the options, the figures, the verdict.

A scenario imports it; Locust then calls what is registered here, in each of its processes.
"""

import contextlib
import logging
import resource
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gevent
import locust.html
import locust.runners
import locust.stats
import msgspec
from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, Runner, WorkerRunner

from loadtest import summary
from loadtest.local import ServerWatch
from loadtest.objectives import Objective, Verdict, judge, read_objectives
from loadtest.options import add_options
from loadtest.recorder import Recorder, of_worker, to_master
from loadtest.session import Options, Session, begin_session, find_session
from loadtest.web import add_to_web, with_charts

DROP = "sottovoce-drop"
DRAIN = "sottovoce-drain"
TALLY = "sottovoce"
RECORD_SECONDS = 1.0
WORKER_REPORT_SECONDS = 1.0
"""Between two reports of a worker, so that the master's charts show each second."""
LAST_REPORT_SECONDS = 2.5
"""After which what a worker counted last has come."""

log = logging.getLogger("sottovoce")
_recorders: WeakKeyDictionary[Environment, Recorder] = WeakKeyDictionary()


def recorder_of(environment: Environment) -> Recorder:
    """In the process that reports the run."""
    return _recorders[environment]


def three_digits(response_time: float) -> int:
    """Locust's histograms keep two digits, so that 254 ms would meet 250; these keep three."""
    if response_time < 1_000:
        return round(response_time)
    return round(round(response_time), -1 if response_time < 10_000 else -2)


def _tune_locust() -> None:
    """By the module's variables, which is how Locust lets them be set."""
    locust.stats.bucket_response_time = three_digits
    locust.stats.PERCENTILES_TO_REPORT = [0.5, 0.9, 0.95, 0.99, 0.999, 1.0]
    locust.stats.PERCENTILES_TO_STATISTICS = [0.99, 0.999]
    locust.stats.PERCENTILES_TO_CHART = [0.5, 0.99, 0.999]
    locust.runners.WORKER_REPORT_INTERVAL = WORKER_REPORT_SECONDS
    locust.html.PERCENTILES_FOR_HTML_REPORT = [0.5, 0.9, 0.95, 0.99, 0.999, 1.0]


class Plugin:
    """In one of Locust's processes: alone, its master, or one of its workers."""

    def __init__(self, environment: Environment, runner: Runner) -> None:
        self._environment = environment
        self._runner = runner
        self._reports = not isinstance(runner, WorkerRunner)
        self._has_users = not isinstance(runner, MasterRunner)
        self._recorder = _recorders[environment] = Recorder(environment)
        self._recording: gevent.Greenlet[..., None] | None = None
        self._server: ServerWatch | None = None
        self._verdict: Verdict | None = None
        self._figures: dict[str, float] = {}
        self._objectives: list[Objective] = []
        found = environment.events
        found.test_start.add_listener(self.on_start)
        found.test_stopping.add_listener(self.on_stopping)
        found.quitting.add_listener(self.on_quitting)
        found.quit.add_listener(self.on_quit)
        found.report_to_master.add_listener(self.on_report_to_master)
        found.worker_report.add_listener(self.on_worker_report)
        if self._has_users:
            runner.register_message(DROP, self.on_drop)
            runner.register_message(DRAIN, self.on_drain, concurrent=True)
        if self._reports:
            add_to_web(environment, self._recorder)

    @property
    def _scenario(self) -> str:
        return Path(self._environment.locustfile or "").stem

    @property
    def _parsed(self) -> Any:
        return self._environment.parsed_options

    # A run

    def on_start(self, **_: object) -> None:
        self._recorder.begin()
        self._verdict = None
        try:
            if self._has_users:
                self._begin_session()
            if self._reports:
                self._objectives = read_objectives(Path(self._parsed.objectives), self._scenario)
                if self._parsed.server_ready:
                    self._server = ServerWatch(Path(self._parsed.server_ready))
                self._recording = gevent.spawn(self._record)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.error("the run cannot begin: %s", error)
            gevent.spawn(self._runner.quit)

    def _begin_session(self) -> None:
        index, of = 0, 1
        if isinstance(self._runner, WorkerRunner):
            index, of = self._runner.worker_index, self._parsed.expect_workers
        options = Options.of(self._parsed)
        begin_session(Session(self._environment, options, index=index, of=of))

    def _record(self) -> None:
        while True:
            gevent.sleep(RECORD_SECONDS)
            self._note()
            self._recorder.record()
            if self._server is not None:
                self._server.look()

    def _note(self) -> None:
        session = find_session(self._environment)
        if session is not None:
            self._recorder.note("here", session.ledger.tally, session.open)

    def on_drop(self, msg: Any, **_: object) -> None:
        session = find_session(self._environment)
        if session is not None:
            session.drop_everybody(return_within=msg.data["return_within"])

    def on_drain(self, **_: object) -> None:
        session = find_session(self._environment)
        if session is not None:
            session.drain()

    def on_stopping(self, **_: object) -> None:
        """What is on its way arrives before anybody leaves, and the figures are closed."""
        if isinstance(self._runner, MasterRunner):
            self._runner.send_message(DRAIN, None)
            gevent.sleep(self._parsed.settle_seconds + LAST_REPORT_SECONDS)
        self.on_drain()
        if self._reports and self._recording is not None:
            self._recording.kill()
            self._recording = None
            self._note()
            self._recorder.record()
            self._judge()
        session = find_session(self._environment)
        if session is not None:
            session.stop()  # thousands of users end now, and their end is no part of the run

    def _judge(self) -> None:
        figures = self._recorder.figures()
        if self._server is not None:
            figures |= self._server.figures()
        self._verdict = judge(self._objectives, figures)
        self._figures = figures
        if not self._parsed.headless:  # else at the very end, below what Locust prints
            summary.show(self._scenario, figures, self._verdict, self._recorder.marks)
        if self._parsed.summary:
            summary.write(
                Path(self._parsed.summary),
                self._scenario,
                figures,
                self._verdict,
                self._recorder.marks,
            )

    def on_quitting(self, **_: object) -> None:
        if not self._reports:
            return
        file = self._parsed.html_file
        if file and Path(file).exists():
            report = Path(file).read_text(encoding="utf-8")
            Path(file).write_text(with_charts(report, self._recorder), encoding="utf-8")
        if self._verdict is None:
            self._environment.process_exit_code = 2  # no run came to its end
        else:
            code = self._verdict.exit_code or int(bool(self._runner.exceptions))
            self._environment.process_exit_code = code

    def on_quit(self, **_: object) -> None:
        if self._verdict is not None and self._parsed.headless:
            summary.show(self._scenario, self._figures, self._verdict, self._recorder.marks)

    # Locust's master and its workers

    def on_report_to_master(self, data: dict[str, Any], **_: object) -> None:
        session = find_session(self._environment)
        if session is not None:
            data[TALLY] = to_master(session.ledger.tally, session.open)

    def on_worker_report(self, client_id: str, data: dict[str, Any], **_: object) -> None:
        if TALLY in data:
            self._recorder.note(client_id, *of_worker(data[TALLY]))


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _on_init(environment: Environment, runner: Runner, **_: object) -> None:
    _raise_file_limit()
    Plugin(environment, runner)


_tune_locust()
events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(_on_init)
