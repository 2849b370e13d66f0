"""`sottovoce serve`: the server, by the environment's settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import structlog
import trio
import typer

from server.auth.jwks import PemKey
from server.cli.output import refuse, say
from server.engine.environment import with_env_file
from server.engine.options import CertificateError, EngineName, engine_options
from server.engine.sockets import listen, url_of
from server.engine.supervisor import Supervisor, WorkersFailed
from server.logs import configure_logging
from server.settings import Settings, SettingsError, doubtful_settings, load_settings
from server.version import VERSION
from storage.postgres.migrate import MigrationError, pending

log = structlog.get_logger("serve")


def serve(
    host: Annotated[str, typer.Option(help="Name or address to listen on.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes; one per core is a good start.")
    ] = 1,
    env_file: Annotated[
        Path | None,
        typer.Option(help="Settings that go over the environment's; read again at SIGHUP."),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Whose HTTP/1.1: ours, or stock Hypercorn's.")
    ] = "ours",
    certfile: Annotated[
        Path | None, typer.Option(help="PEM, with --keyfile: serve TLS, and HTTP/2 over it.")
    ] = None,
    keyfile: Annotated[Path | None, typer.Option(help="PEM, without a passphrase.")] = None,
) -> None:
    """Serve in production. Settings come from the environment; see the README's table."""
    try:
        options = engine_options(engine, certfile, keyfile)
        env = with_env_file(os.environ, env_file)
        settings = load_settings(env)
        if settings.clerk_jwt_key:
            PemKey(settings.clerk_jwt_key)
    except CertificateError as error:
        refuse([str(error)])
    except SettingsError as error:
        refuse(error.findings)
    except (OSError, UnicodeDecodeError):
        refuse([f"{env_file} cannot be read"])
    except ValueError as error:
        refuse([f"CLERK_JWT_KEY is wrong: {error}"])
    configure_logging(settings.log_format, settings.log_level)
    warn_of_settings(env, settings)
    _warn_of_migrations(settings)
    try:
        sock = listen(host, port, stall_seconds=settings.stall_seconds)
    except OSError as error:
        refuse([f"cannot listen on {host} port {port}: {error.strerror}"])
    say(f"sottovoce {VERSION}: serving on {url_of(sock, tls=options.tls)}")
    with sock:
        supervisor = Supervisor(
            sock,
            workers=workers,
            env=os.environ,
            drain_seconds=settings.drain_seconds,
            options=options,
            env_file=env_file,
        )
        if not trio.run(_supervise, supervisor):
            raise typer.Exit(1)


def warn_of_settings(environ: Mapping[str, str], settings: Settings) -> None:
    """A line in the log for each setting that most likely does not say what was meant."""
    for doubt in doubtful_settings(environ, settings):
        log.warning("setting_doubtful", setting=doubt.setting, reason=doubt.reason)


def _warn_of_migrations(settings: Settings) -> None:
    """A warning and not an end: the server must be able to start while PostgreSQL is away."""
    try:
        missing = pending(settings.database_conninfo)
    except MigrationError as error:
        say(f"sottovoce: warning: migrations cannot be looked at: {error}")
        return
    if missing:
        names = ", ".join(missing)
        say(f"sottovoce: warning: not migrated ({names}): sottovoce migrate")


async def _supervise(supervisor: Supervisor) -> bool:
    """Whether it ended because it was told to."""
    failed = False
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.obey_signals)
        try:
            await supervisor.run()
        except WorkersFailed:
            failed = True
        nursery.cancel_scope.cancel()
    return not failed
