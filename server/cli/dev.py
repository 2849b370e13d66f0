"""`sottovoce dev`: everything on this machine, from one command, with people to try it as.

PostgreSQL, Valkey and the issuer of tokens are its own. They are started before Trio and
stopped after it, in this thread: the kernel ends them when the thread ends, however it ends.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import httpx
import psycopg
import trio
import typer

from server.cli.local_issuer import LocalIssuer
from server.cli.output import let_sigterm_interrupt, refuse
from server.cli.people import Seeded, clerk_id_of, seed_people
from server.cli.ready import FILE, Person, Pids, Ready, write_ready
from server.cli.serve import warn_of_settings
from server.engine.options import CertificateError, EngineName, EngineOptions, engine_options
from server.engine.sockets import listen, url_of
from server.engine.supervisor import Supervisor, WorkersFailed
from server.logs import configure_logging
from server.settings import Settings, SettingsError, load_settings
from storage.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import MigrationError, migrate

FLAG = "NEXT_PUBLIC_ENABLE_CHAT_FEATURE"
READY_SECONDS = 30.0
WATCH_SECONDS = 1.0
OTHER_CONNECTIONS = 30
"""To PostgreSQL, besides the workers': migrate, seed, doctor, and a person with psql."""


class Failed(Exception):
    """What to tell the person who started it."""


class NeverReady(Exception):
    pass


def dev(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 1,
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path(".sottovoce"),
    ready_file: Annotated[
        Path | None, typer.Option(help="Written as JSON once everything answers.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Whose HTTP/1.1: ours, or stock Hypercorn's.")
    ] = "ours",
    certfile: Annotated[
        Path | None, typer.Option(help="PEM, with --keyfile: serve TLS, and HTTP/2 over it.")
    ] = None,
    keyfile: Annotated[Path | None, typer.Option(help="PEM, without a passphrase.")] = None,
) -> None:
    """Serve on this machine, with embedded PostgreSQL and Valkey and a stand-in for Clerk.

    SOTTOVOCE_… and NEXT_PUBLIC_ENABLE_CHAT_FEATURE are taken from the environment.
    """
    let_sigterm_interrupt()
    data_dir = data_dir.resolve()
    ready_files = [data_dir / FILE, *([ready_file.resolve()] if ready_file else [])]
    try:
        options = engine_options(engine, certfile, keyfile)
        environ = _environment(os.environ)
        settings = load_settings(environ)
        configure_logging(settings.log_format, settings.log_level)
        warn_of_settings(environ, settings)
        with _owned(data_dir):
            try:
                _run(settings, host, port, workers, options, data_dir, ready_files)
            finally:
                for file in ready_files:
                    file.unlink(missing_ok=True)
    except KeyboardInterrupt:  # before or after Trio ran, which handles its own
        raise typer.Exit(130) from None
    except SettingsError as error:
        refuse(error.findings)
    except (Failed, CertificateError, EmbeddedError, MigrationError) as error:
        refuse([str(error)])
    except psycopg.Error:
        refuse(["the people cannot be seeded: is this an older version's database?"])


def _environment(environ: Mapping[str, str], **services: str) -> dict[str, str]:
    """The workers' environment.

    Args:
        environ: the caller's; SOTTOVOCE_… and the flag override what is usual for dev.
        services: what is embedded, by the settings' names; it overrides the caller's.
    """
    usual = {
        FLAG: "true",
        "SOTTOVOCE_LOG_FORMAT": "console",
        "SOTTOVOCE_DRAIN_SECONDS": "1",  # nobody waits for it here
        "SOTTOVOCE_MAX_SENDS_PER_SECOND": "1000",  # scripts and load tests type faster
    }
    embedded = {
        "UPSTASH_REDIS_URL": "redis://127.0.0.1",
        "DB_HOST": "127.0.0.1",
        "DB_PORT": "5432",
        "DB_USER": EmbeddedPostgres.user,
        "DB_PASSWORD": "",
        "DB_DATABASE": EmbeddedPostgres.database,
        "SOTTOVOCE_DB_SSLMODE": "disable",  # it never leaves the machine
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_MTI3LjAuMC4xJA==",
        "CLERK_SECRET_KEY": "",
        "CLERK_JWT_KEY": "",
        "SOTTOVOCE_TOKEN": "",  # the doctor's
    }
    return usual | dict(environ) | embedded | services


@contextlib.contextmanager
def _owned(data_dir: Path) -> Iterator[None]:
    """The data folder, as long as the block lasts. The lock ends with this process."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data_dir / "dev.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(
                f"another sottovoce dev is running in {data_dir}: stop it, or use --data-dir"
            ) from None
        yield


def _run(
    settings: Settings,
    host: str,
    port: int,
    workers: int,
    options: EngineOptions,
    data_dir: Path,
    ready_files: list[Path],
) -> None:
    try:
        sock = listen(host, port, stall_seconds=settings.stall_seconds)
    except OSError as error:
        raise Failed(f"cannot listen on {host} port {port}: {error.strerror}") from None
    try:
        local_issuer = LocalIssuer(data_dir)
    except ValueError as error:
        raise Failed(str(error)) from None
    connections = workers * settings.db_connections + OTHER_CONNECTIONS
    postgres = EmbeddedPostgres(data_dir / "postgres", config={"max_connections": connections})
    valkey = EmbeddedValkey(data_dir / "valkey")
    with sock, postgres, valkey, local_issuer as issuer:
        migrate(postgres.conninfo)
        demo = Demo(
            settings,
            sock,
            postgres=postgres,
            valkey=valkey,
            issuer=issuer,
            people=seed_people(postgres.conninfo),
            workers=workers,
            options=options,
            ready_files=ready_files,
        )
        trio.run(demo.run)


class Demo:
    """The server on services that run already.

    Args:
        settings: of the workers, the services' own aside.
        sock: where it listens.
        people: in the database already.
        workers: how many.
        options: their engine and certificate.
        ready_files: written when everything answers, and again when a worker is replaced.
    """

    def __init__(
        self,
        settings: Settings,
        sock: socket.socket,
        *,
        postgres: EmbeddedPostgres,
        valkey: EmbeddedValkey,
        issuer: LocalIssuer,
        people: dict[str, Seeded],
        workers: int,
        options: EngineOptions,
        ready_files: list[Path],
    ) -> None:
        self._base_url = url_of(sock, tls=options.tls)
        self._certfile = options.certfile
        self._postgres = postgres
        self._valkey = valkey
        self._issuer = issuer
        self._people = people
        self._party = next(iter(settings.authorized_parties), None)
        self._ready_files = ready_files
        self._supervisor = Supervisor(
            sock,
            workers=workers,
            env=_environment(
                os.environ,
                UPSTASH_REDIS_URL=valkey.url,
                DB_HOST=postgres.host,
                DB_PORT=str(postgres.port),
                DB_PASSWORD=postgres.password,
                NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY=issuer.publishable_key,
            ),
            drain_seconds=settings.drain_seconds,
            options=options,
            on_change=self._write_ready,
        )

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; the workers have drained when it returns.

        Raises:
            Failed: it cannot.
        """
        failure = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._supervisor.obey_signals)
                nursery.start_soon(self._watch_services)
                async with trio.open_nursery() as serving:
                    await serving.start(self._supervisor.run)
                    if not self._supervisor.stopping:
                        await self._until_it_answers()
                        self._write_ready()
                        typer.echo(self._what_to_try())
                nursery.cancel_scope.cancel()
        except* WorkersFailed:
            failure = Failed("the workers cannot be kept running; the lines above say why")
        except* NeverReady:
            failure = Failed(f"{self._base_url}/readyz does not say that it is ready")
        if failure is not None:
            raise failure

    async def _until_it_answers(self) -> None:
        with trio.move_on_after(READY_SECONDS):
            # It is our own port on this machine, whatever name the certificate is for.
            async with httpx.AsyncClient(trust_env=False, verify=False) as client:  # noqa: S501
                while not self._supervisor.stopping:
                    with contextlib.suppress(httpx.HTTPError):
                        answer = await client.get(f"{self._base_url}/readyz")
                        if answer.status_code == 200:
                            return
                    await trio.sleep(0.05)
                return
        raise NeverReady

    async def _watch_services(self) -> None:
        """Say once that a service has ended. It stays away: that is how to try such a day."""
        servers = [self._postgres, self._valkey]
        while servers:
            await trio.sleep(WATCH_SECONDS)
            for server in [server for server in servers if not server.running]:
                servers.remove(server)
                typer.echo(f"sottovoce: {server.name} has ended by itself", err=True)

    def _write_ready(self) -> None:
        people = {part: self._person(part) for part in self._people}
        channel_id = self._people["prospect"].channel_id
        assert channel_id is not None
        ready = Ready(
            base_url=self._base_url,
            channel_id=channel_id,
            **people,
            database_url=self._postgres.url,
            redis_url=self._valkey.url,
            issuer=self._issuer.url,
            jwt_key_file=str(self._issuer.key.path),
            authorized_party=self._party,
            pids=Pids(
                supervisor=os.getpid(),
                workers=self._supervisor.pids,
                postgres=self._postgres.pid,
                redis=self._valkey.pid,
            ),
        )
        write_ready(ready, *self._ready_files)

    def _person(self, part: str) -> Person:
        seeded = self._people[part]
        return Person(
            user_id=seeded.user_id,
            email=seeded.email,
            token=self._token(part),
            channel_id=seeded.channel_id if part == "lapsed" else None,
        )

    def _token(self, part: str) -> str:
        return self._issuer.key.sign(
            clerk_id_of(part), issuer=self._issuer.url, authorized_party=self._party
        )

    def _what_to_try(self) -> str:
        url, channel = self._base_url, self._people["prospect"].channel_id
        curl = f"curl --cacert {self._certfile}" if self._certfile else "curl"
        stream = (
            f"{curl} -N -H 'Authorization: Bearer {self._token('prospect')}' "
            f"{url}/api/chat/{channel}"
        )
        send = (
            f"{curl} -H 'Authorization: Bearer {self._token('therapist')}' "
            "-H 'Content-Type: application/json' "
            f"""-d '{{"channelId":{channel},"content":"Hello"}}' {url}/api/chat/send"""
        )
        return f"""
Sottovoce serves on {url}. Its data: {self._ready_files[0].parent}

The client's stream; it stays open:

{stream}

A message from the therapist, from another terminal:

{send}

sottovoce token, sottovoce doctor and sottovoce seed work on it too. Ctrl-C ends everything.
"""
