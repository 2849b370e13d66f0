"""One worker process: Hypercorn's Trio server around the application, and its signals.

    SIGTERM   drain, then end; a second one ends at once
    SIGUSR1   retire: as SIGTERM, but leave new connections to the other workers from now on
    SIGHUP    read the env file again, and turn the chat on or off by it
    SIGINT    ignored: Ctrl-C is the supervisor's, which ends its workers in order

Its standard input is the supervisor's lifeline: at its end the supervisor is gone, and the
worker drains. The descriptor `--ready-fd` says the opposite way how this worker is: a word when
it serves, or why it gives up, and its end when it has died.
"""

import argparse
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve

from server.engine.accepting import install_accepting
from server.engine.containment import contain_connections
from server.engine.environment import with_env_file
from server.engine.http1 import Engine, Limits
from server.engine.http2 import install_http2
from server.engine.options import CertificateError, EngineName, EngineOptions, engine_options
from server.engine.sockets import BACKLOG
from server.logs import configure_logging, hide_uncaught_exceptions
from server.settings import SettingsError, doubtful_settings, load_settings, why_chat_is_off
from server.version import VERSION
from storage.metrics import NOT_SHARED

WRONG_SETTINGS = 3
"""The exit status that no restart can change."""

END_SECONDS = 15.0
"""From SIGTERM to the end, over `drain_seconds`: the four below, and a second or so."""

DRAIN_MARGIN_SECONDS = 5.0
"""For sends in flight and the last bytes of the last stream."""

FAREWELL_SECONDS = 0.5
"""Before the end, for who uses a connection again and again: to be told that it closes."""

RETIREMENT_SECONDS = 2.0
"""For the same where others accept. A connection that is closed while its client begins to speak
costs that client an error, and who has been silent for so long hardly will just then."""

GRACE_SECONDS = 3.0
"""After the drain, for what still holds a connection."""

LIFESPAN_SECONDS = 5.0
"""To close pools and write the last audit rows."""

START_SECONDS = 30.0

UNREADY_SECONDS = 1.0
"""How long a worker in which no request could succeed waits before it accepts. Then it accepts all
the same: its answers and `/readyz` say what is wrong."""

SUCCESSOR_SECONDS = 10.0
"""How long a successor waits in that case. Then it gives up, and the worker that it was to replace
stays. A PostgreSQL or an issuer that is merely slow answers well within it."""

READY = b"1"
"""What a worker writes to `--ready-fd` when it serves. A successor that gives up writes its reasons
there, in a line."""

MAX_REASON_BYTES = 2000
"""The most bytes of reasons that a successor writes: a pipe takes so much at once, unread."""

SPARE_FILES = 400
"""Of the process's limit: for PostgreSQL, Redis, who is turned away, and what Python opens."""

COLLECT = (10_000, 1_000, 1_000)
"""The collector's thresholds: new objects, then collections of each younger generation. The
youngest takes half a ms. The middle one has all that came since: looked at after ten of the
youngest, a crowd of new streams took 5 % more CPU, and one in a hundred of them 59 ms in place of
29. It comes with the 70,000th stream now, a full one practically never."""

HANDSHAKE_SECONDS = 15.0
"""Of TLS: a few round trips, and on a bad line each of them twice."""

log = structlog.get_logger("worker")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Application(Protocol):
    """What a worker serves."""

    @property
    def unready(self) -> Sequence[str]:
        """Why no request could succeed now, a sentence each, free of secrets; empty: it could."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None: ...

    async def answer_full(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer the request of a connection that there is no room for."""

    async def drain(self, *, refuse: bool) -> None:
        """End the streams, wait for what is in flight; within a limit.

        Args:
            refuse: take no new streams, for nobody will: the whole server ends.
        """

    def set_enabled(self, enabled: bool, /) -> None:
        """Turn the chat on or off."""


class Worker:
    """One application on one socket, from its start to its end.

    Args:
        app: what is served.
        drain_seconds: `Settings.drain_seconds`.
        options: whose HTTP it speaks, and whether under TLS.
        limits: of its connections, where the HTTP is ours.
        successor: it is to take the place of one that serves.
        read_flag: why the chat is to be off, by the env file as it is now, or None where it is to
            be on. No function: there is no file.

    Attributes:
        findings: why the application refused to start, a line each; None if it did not.
        failed: something broke, and the log says what.
    """

    def __init__(
        self,
        app: Application,
        *,
        drain_seconds: float,
        options: EngineOptions,
        limits: Limits,
        successor: bool = False,
        read_flag: Callable[[], str | None] | None = None,
    ) -> None:
        self.findings: list[str] | None = None
        self.failed = False
        self._app = app
        self._drain_seconds = drain_seconds
        self._options = options
        self._engine = Engine(app, limits, full=app.answer_full)
        self._successor = successor
        self._read_flag = read_flag
        self._started = False  # the application, that is
        self._ready_fd = -1
        self._ready = False
        self._ending = trio.Event()
        self._retiring = False
        self._config = hypercorn_config(options)

    async def run(self, sock: socket.socket, *, ready_fd: int, lifeline_fd: int) -> None:
        """Serve until a signal or the end of the lifeline, and never raise: see `failed`."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._obey_signals, nursery.cancel_scope)
                nursery.start_soon(self._hold_lifeline, lifeline_fd, nursery.cancel_scope)
                nursery.start_soon(self._engine.sweep)
                await self._serve(sock, ready_fd)
                nursery.cancel_scope.cancel()
        except Exception as error:
            if self.findings is None and not self.failed:  # else it is said already
                log.critical("worker_failed", exc_info=_innermost(error))
            self.failed = True

    async def _serve(self, sock: socket.socket, ready_fd: int) -> None:
        self._ready_fd = ready_fd
        install_http2()
        install_accepting()
        if self._options.engine == "ours":
            self._engine.install()
        else:
            contain_connections()
        secure, insecure = ([sock], []) if self._options.tls else ([], [sock])
        async with trio.open_nursery() as nursery:
            app: Any = self._run_app  # Hypercorn's types name every message
            serve = partial(
                worker_serve,
                ASGIWrapper(app),
                self._config,
                sockets=Sockets(secure_sockets=secure, insecure_sockets=insecure, quic_sockets=[]),
                shutdown_trigger=partial(self._until_the_end, nursery),
            )
            await nursery.start(serve)
            # Hypercorn says that it has started where the lifespan's startup failed, too.
            if not self._started:
                return
            _calm_collector()
            self._ready = True
            os.write(ready_fd, READY)
            log.info("worker_ready", version=VERSION)

    async def _run_app(self, scope: Message, receive: Receive, send: Send) -> None:
        """The application, with an eye on its lifespan: where that fails, Hypercorn goes on
        without it, and we must not."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        told_to_end = False

        async def receive_and_see() -> Message:
            nonlocal told_to_end
            message = await receive()
            told_to_end = told_to_end or message["type"] == "lifespan.shutdown"
            return message

        async def send_and_see(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._started = await self._wait_until_ready()
                if not self._started:
                    message = {"type": "lifespan.startup.failed", "message": ""}
            elif message["type"] == "lifespan.startup.failed":
                self.findings = message.get("message", "").splitlines()
            await send(message)

        try:
            await self._app(scope, receive_and_see, send_and_see)
        except Exception as error:
            if self.findings is not None or self.failed:
                raise
            log.critical("application_failed", exc_info=_innermost(error))
            self.failed = True
        if not self._started:
            await send({"type": "lifespan.startup.failed", "message": ""})  # raises
        if not told_to_end:
            self.failed = True
            self._ending.set()

    async def _wait_until_ready(self) -> bool:
        """Whether to accept, then."""
        seconds = SUCCESSOR_SECONDS if self._successor else UNREADY_SECONDS
        with trio.move_on_after(seconds):
            while self._app.unready:  # noqa: ASYNC110 - a few times at the start
                await trio.sleep(0.02)
        if not (reasons := list(self._app.unready)):
            return True
        if not self._successor:
            log.warning("worker_not_ready", seconds=seconds, reasons=reasons)
            return True
        log.error("successor_not_ready", seconds=seconds, reasons=reasons)
        os.write(self._ready_fd, "; ".join(reasons).encode()[:MAX_REASON_BYTES])
        self.failed = True
        return False

    async def _until_the_end(self, nursery: trio.Nursery) -> None:
        """Hypercorn's shutdown trigger: it stops listening and closes once this returns."""
        await self._ending.wait()
        # Whatever hangs from here on: the kernel ends us. A stuck loop cannot be in its way.
        signal.alarm(int(self._drain_seconds + END_SECONDS))
        if self._retiring:
            # Others accept on the same socket: who comes now is theirs, and is not turned away.
            self._engine.draining = True
            self._config.graceful_timeout += self._drain_seconds + DRAIN_MARGIN_SECONDS
            nursery.start_soon(self._drain)
        else:
            await self._drain()

    async def _drain(self) -> None:
        log.info("worker_draining")
        with trio.move_on_after(self._drain_seconds + DRAIN_MARGIN_SECONDS) as scope:
            try:
                await self._app.drain(refuse=not self._retiring)
            except Exception as error:
                log.error("drain_failed", exc_info=_innermost(error))
                self.failed = True
        if scope.cancelled_caught:
            log.warning("drain_timed_out")
        # If nobody else accepts, not sooner: whoever leaves comes back to us, and each return
        # costs an accept.
        self._engine.draining = True
        patience = min(FAREWELL_SECONDS, self._drain_seconds / 10)
        with trio.move_on_after(RETIREMENT_SECONDS if self._retiring else patience):
            while self._engine.connections:  # noqa: ASYNC110 - a few times at the end
                await trio.sleep(0.02)
        self._engine.close_idle()

    def _end(self, everything: trio.CancelScope) -> None:
        if self._ready:
            self._ending.set()
        else:
            everything.cancel()

    async def _obey_signals(
        self,
        everything: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) as signals:
            task_status.started()
            told = False
            async for received in signals:
                if received == signal.SIGHUP:
                    self._reload()
                elif received == signal.SIGUSR1:
                    self._retiring = self._ready and not self._ending.is_set()
                    self._end(everything)
                elif told:
                    os._exit(1)
                else:  # also to one that retires: it ends already, in order
                    told = True
                    self._end(everything)

    async def _hold_lifeline(self, fd: int, everything: trio.CancelScope) -> None:
        async with trio.lowlevel.FdStream(fd) as lifeline:
            while await lifeline.receive_some(64):
                pass
        log.warning("supervisor_gone")
        self._end(everything)

    def _reload(self) -> None:
        if self._read_flag is None:
            log.warning("reload_ignored", reason="no env file")
            return
        try:
            off = self._read_flag()
        except (OSError, UnicodeDecodeError) as error:
            log.error("reload_failed", exc_info=error)
            return
        log.info("reloaded", chat_enabled=off is None, reason=off)
        self._app.set_enabled(off is None)


class _HypercornLog:
    """Hypercorn's own log, without its texts: they may quote what a client sent."""

    def __init__(self, config: Config) -> None:
        pass

    async def access(self, *_: Any) -> None:
        pass

    async def debug(self, *_: Any, **__: Any) -> None:
        pass

    info = debug

    async def warning(self, *_: Any, **__: Any) -> None:
        log.warning("hypercorn_event", exc_info=sys.exc_info()[1])

    async def error(self, *_: Any, **__: Any) -> None:
        log.error("hypercorn_event", exc_info=sys.exc_info()[1])

    critical = exception = error


def hypercorn_config(options: EngineOptions) -> Config:
    """Hypercorn's settings; what is not named here is as it comes: TLS 1.2 or later, HTTP/2 where
    the client's ALPN asks for it."""
    logger: Any = _HypercornLog
    config = Config()
    if options.certfile is not None and options.keyfile is not None:
        config.certfile = str(options.certfile)
        config.keyfile = str(options.keyfile)
    config.logger_class = logger
    config.include_server_header = False
    config.backlog = BACKLOG
    config.startup_timeout = START_SECONDS
    config.shutdown_timeout = LIFESPAN_SECONDS
    config.graceful_timeout = GRACE_SECONDS
    # Over the usual 60 s of load balancers: whoever sends last on an idle connection must not
    # find it closed.
    config.keep_alive_timeout = 75.0
    config.ssl_handshake_timeout = HANDSHAKE_SECONDS
    # Closing every thousandth request would only cost new handshakes; nothing leaks.
    config.keep_alive_max_requests = 1_000_000_000
    # Of request line and headers. A credential that is far too long gets its 401 from us.
    config.h11_max_incomplete_size = 128 * 1024
    return config


def _innermost(error: BaseException) -> BaseException:
    """The one error that nurseries have wrapped, or the group where there are more."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _calm_collector() -> None:
    """Have the garbage collector look at what is young, and leave what lives as long as streams.

    A full collection walks every object of every stream: 0.23 s at 6,000, in which nobody is
    served. Streams and requests leave no cycles behind (tests/server/live see to it), so that
    reference counts free them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


def _raise_file_limit() -> int:
    """A connection is a descriptor; the soft limit is often 1024, the hard one is the real.

    Returns:
        The limit that holds now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        log.warning("file_limit_unchanged", files=soft)
        return soft
    return hard


def main() -> int:
    """One worker; the supervisor starts it.

    Returns:
        0: ended as asked. 3: the settings are wrong, and standard error says which.
        1: it broke, and the log says how.
    """
    parser = argparse.ArgumentParser(prog="python -m server.engine.worker")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--env-file", type=Path)
    parser.add_argument("--successor", action="store_true", help="one that serves is there")
    parser.add_argument("--app", default="server.app:app", help="module:attribute")
    parser.add_argument("--engine", choices=get_args(EngineName), default="ours")
    parser.add_argument("--certfile", type=Path)
    parser.add_argument("--keyfile", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    environ = dict(os.environ)
    try:
        values = with_env_file(environ, arguments.env_file)
        settings = load_settings(values)
    except SettingsError as error:
        return _refuse(error.findings)
    except (OSError, UnicodeDecodeError):
        return _refuse(["the env file cannot be read"])
    try:
        options = engine_options(arguments.engine, arguments.certfile, arguments.keyfile)
    except CertificateError as error:
        return _refuse([str(error)])
    os.environ.update(values)  # where the application reads its settings
    lines = configure_logging(settings.log_format, settings.log_level)
    hide_uncaught_exceptions()
    files = _raise_file_limit()
    if arguments.successor:  # with settings that the command has not seen
        for doubt in doubtful_settings(values, settings):
            log.warning("setting_doubtful", setting=doubt.setting, reason=doubt.reason)
    if NOT_SHARED is not None:
        log.warning("metrics_not_shared", reason=NOT_SHARED)

    def read_flag() -> str | None:
        return why_chat_is_off(with_env_file(environ, arguments.env_file))

    module, _, attribute = arguments.app.partition(":")
    worker = Worker(
        getattr(import_module(module), attribute),
        drain_seconds=settings.drain_seconds,
        options=options,
        limits=Limits(
            connections=min(settings.max_connections, files - SPARE_FILES),
            stall_seconds=settings.stall_seconds,
        ),
        successor=arguments.successor,
        read_flag=read_flag if arguments.env_file else None,
    )
    trio.run(
        partial(
            worker.run,
            socket.socket(fileno=arguments.fd),
            ready_fd=arguments.ready_fd,
            lifeline_fd=sys.stdin.fileno(),
        ),
        instruments=[lines],
    )
    if worker.findings:
        return _refuse(worker.findings)
    return 1 if worker.failed else 0


def _refuse(findings: list[str]) -> int:
    print(*findings, sep="\n", file=sys.stderr)  # noqa: T201
    return WRONG_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
