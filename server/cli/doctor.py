"""`sottovoce doctor`: looks at everything that a deployment needs, and says what to do about it.

Each check is a method that returns what it found or raises a `Fault` with a remedy. None of
them takes longer than `CHECK_SECONDS`, whatever hangs. Nothing that a server, a database or a
person sent is printed.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psycopg
import redis
import trio
import typer
from psycopg.conninfo import conninfo_to_dict

from protocol.confidential import Confidential, Secret
from server.auth.clerk import TokenRefused, TokenVerifier
from server.auth.jwks import KeySource, PemKey, RemoteKeys, fetch_jwks, jwks_url, parse_jwks
from server.cli.checks import (
    CLIENT_SECONDS,
    ONCE_SECONDS,
    Check,
    Fault,
    client_of,
    code_of,
    examine,
    open_stream,
    remedy_for,
)
from server.cli.local_issuer import SigningKey
from server.cli.output import refuse
from server.cli.outside import Outside, View
from server.cli.ready import NotRunning, read_ready
from server.cli.token import sign
from server.logs import configure_logging
from server.settings import Settings, SettingsError, load_settings
from storage.postgres.migrate import MigrationError, pending, unmet_for_serving
from storage.postgres.unreachable import why_unreachable
from storage.redis import Keys, examination
from storage.redis.refusal import Refusal

REQUIRED = [field.encode_name for field in msgspec.structs.fields(Settings) if field.required]
TRIGGERS = {"chat_audit_no_change", "chat_audit_no_truncate"}


class Target(Confidential, frozen=True, kw_only=True):
    """What is examined."""

    name: str
    settings: Settings | None
    """None for a dev server, which has its own."""
    conninfo: str | dict[str, Any]
    redis_url: Secret
    issuer: str
    jwt_key: str
    authorized_parties: tuple[str, ...]
    base_url: str
    channel_id: int | None
    token: str
    """A therapist's; empty if there is none."""


def doctor(
    data_dir: Annotated[
        Path, typer.Option(help="Of the running dev, where the environment has no settings.")
    ] = Path(".sottovoce"),
    base_url: Annotated[
        str | None, typer.Option(help="The running server; http://127.0.0.1:8000 if not given.")
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(min=1, help="A channel of the token's therapist. A message is sent to it."),
    ] = None,
    from_outside: Annotated[
        bool,
        typer.Option(
            "--from-outside", help="Only what a browser reaches, through the proxies in between."
        ),
    ] = False,
) -> None:
    """Look at a deployment and name what is wrong with it.

    It looks at what the environment's settings name, and at the running server as the therapist
    whose session token is in SOTTOVOCE_TOKEN. Without settings: at `sottovoce dev`.
    """
    configure_logging("console", "error")  # the lines here are ours
    if from_outside:
        view = _view(data_dir, base_url, channel)
        if not trio.run(examine, Outside(view).checks()):
            raise typer.Exit(1)
        return
    try:
        target = _target(data_dir, base_url, channel)
    except SettingsError as error:
        for finding in error.findings:
            typer.echo(f"FAIL settings — {finding}")
        typer.echo("     remedy: set them as the README's table says, or start sottovoce dev")
        raise typer.Exit(1) from None
    typer.echo(f"ok   settings — {target.name}")
    if not trio.run(Doctor(target).examine):
        raise typer.Exit(1)


def _view(data_dir: Path, base_url: str | None, channel: int | None) -> View:
    """As the token's therapist; without one, as that of the dev server that runs."""
    token = os.environ.get("SOTTOVOCE_TOKEN", "")
    if not token:
        try:
            ready = read_ready(data_dir)
            token = sign(SigningKey(Path(ready.jwt_key_file)), ready, "therapist")
        except (NotRunning, OSError, ValueError):
            pass
        else:
            base_url, channel = base_url or ready.base_url, channel or ready.channel_id
    if base_url is None:
        refuse(["--from-outside needs --base-url: the URL that browsers use"])
    return View(base_url=base_url.rstrip("/"), channel_id=channel, token=token)


def _target(data_dir: Path, base_url: str | None, channel: int | None) -> Target:
    """Raises: SettingsError."""
    if not any(os.environ.get(name) for name in REQUIRED):
        try:
            ready = read_ready(data_dir)
            token = sign(SigningKey(Path(ready.jwt_key_file)), ready, "therapist")
        except (NotRunning, OSError, ValueError):
            pass
        else:
            return Target(
                name=f"of the dev server in {data_dir}",
                settings=None,
                conninfo=ready.database_url,
                redis_url=Secret(ready.redis_url),
                issuer=ready.issuer,
                jwt_key="",
                authorized_parties=(ready.authorized_party,) if ready.authorized_party else (),
                base_url=base_url or ready.base_url,
                channel_id=channel or ready.channel_id,
                token=token,
            )
    settings = load_settings(os.environ)
    return Target(
        name="complete",
        settings=settings,
        conninfo=settings.database_conninfo,
        redis_url=settings.redis_url,
        issuer=settings.issuer,
        jwt_key=settings.clerk_jwt_key,
        authorized_parties=settings.authorized_parties,
        base_url=(base_url or "http://127.0.0.1:8000").rstrip("/"),
        channel_id=channel,
        token=os.environ.get("SOTTOVOCE_TOKEN", ""),
    )


class Doctor:
    """One examination."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._marker = uuid.uuid4()
        self._checks = (
            Check("server", self._server),
            Check("ready", self._ready, needs="server"),
            Check("flag", self._flag, needs="server"),
            Check("redis", self._redis),
            Check("postgres", self._postgres),
            Check("tables", self._tables, needs="postgres"),
            Check("audit", self._audit, needs="tables"),
            Check("keys", self._keys),
            Check("token", self._token, needs="keys"),
            Check("stream", self._stream, needs="server"),
            Check("message", self._message, needs="stream"),
            Check("export", self._export, needs="message"),
        )

    async def examine(self) -> bool:
        """Print a line for each check; whether all is well."""
        return await examine(self._checks)

    async def _server(self) -> str:
        url = self._target.base_url
        async with self._client() as client:
            try:
                answer = await client.get("/healthz")
            except httpx.HTTPError as error:
                raise Fault(
                    f"{url} does not answer ({type(error).__name__})",
                    "start it (sottovoce serve), or name it with --base-url",
                ) from None
        if answer.status_code != 200:
            raise Fault(f"{url}/healthz says {answer.status_code}", "is it sottovoce's URL?")
        return f"{url} lives"

    async def _ready(self) -> str:
        async with self._client() as client:
            answer = await client.get("/readyz")
        try:
            ready = answer.json()
            reasons = [str(reason) for reason in ready["database"]]
            down = [name for name in ("redis", "postgres") if ready[name] != "up"]
            down += ["keys"] if ready["keys"] != "known" else []
            status, draining = ready["status"], ready["draining"]
        except (ValueError, KeyError, TypeError):
            raise Fault("/readyz does not say", "is it sottovoce's URL?") from None
        if draining:
            raise Fault("it is shutting down", "wait, and look again")
        if reasons and "postgres" not in down:
            raise Fault(
                f"no request could succeed in its database: {len(reasons)} things are missing",
                "see the line on tables, and `requirements_unmet` in the server's log",
            )
        if down or status != "ready":
            raise Fault(
                f"it is {'degraded' if status == 'degraded' else 'not ready'}, "
                f"without {' and '.join(down) or 'something'}, as it sees it",
                "see the lines on redis, postgres and keys; where they are ok, the way from the "
                "server's machine to them is not",
            )
        return "redis and postgres are up and the keys are known, as the server sees it"

    async def _flag(self) -> str:
        settings = self._target.settings
        remedy = "set NEXT_PUBLIC_ENABLE_CHAT_FEATURE=true (exactly) and start the server again"
        if settings is not None and not settings.chat_enabled:
            raise Fault("NEXT_PUBLIC_ENABLE_CHAT_FEATURE is not 'true' in this environment", remedy)
        async with self._client() as client:
            answer = await client.get("/api/chat/availability")
        if answer.status_code == 404:
            raise Fault("the running server has the chat turned off", remedy)
        return "the chat is turned on"

    async def _redis(self) -> str:
        url, keys = self._target.redis_url, self._keys_in_redis()
        try:
            examined = await examination.examine(url, keys)
        except (redis.exceptions.RedisError, OSError, ValueError) as error:
            raise Fault(
                f"it cannot be reached ({examination.why_unreachable(error)})",
                "start it, and look at UPSTASH_REDIS_URL, the network and its TLS (redis:// is "
                "without, rediss:// with; SSL_CERT_FILE names the CA where it is your own); until "
                "then the chat works, by the longer way",
            ) from None
        if examined.refusals:
            findings, remedies = zip(*map(self._refused, examined.refusals), strict=True)
            rules = " ".join(remedy for remedy in remedies if remedy[0] in "+~&")
            others = [remedy for remedy in remedies if remedy[0] not in "+~&"]
            if rules:
                whole = examination.rights(url, keys)
                others.append(f"ACL SETUSER <its user> {rules} (all it needs: {whole})")
            raise Fault("; ".join(findings), "; ".join(others))
        return f"reads, writes, publishes and subscribes; maxmemory-policy {examined.policy}"

    def _keys_in_redis(self) -> Keys:
        conninfo = self._target.conninfo
        return Keys(conninfo_to_dict(conninfo) if isinstance(conninfo, str) else conninfo)

    def _refused(self, refusal: Refusal) -> tuple[str, str]:
        """(what it refuses, the remedy: an ACL rule, or a sentence)"""
        pattern = examination.key_pattern(self._keys_in_redis())
        match refusal.what:
            case "login":
                remedy = "correct them in UPSTASH_REDIS_URL (percent-encoded), or the token in "
                remedy += "UPSTASH_REDIS_REST_TOKEN (not the read-only one)"
                return "it refuses the user or the password", remedy
            case "command":
                name = refusal.name or "a command of the scripts"
                return f"its user may not run {name}", f"+{refusal.name or '@all'}"
            case "key":
                return f"its user may not read and write keys {pattern}", f"~{pattern}"
            case "channel":
                return f"its user may not use pub/sub channels {pattern}", f"&{pattern}"
            case "unknown command":
                return (
                    f"it does not know {refusal.name or 'a command'}",
                    "Redis 6.2 or later, a cluster 7 or later, or Valkey",
                )
            case "database":
                return "it has no such database", "name another one in UPSTASH_REDIS_URL, or none"
            case "memory":
                return "its memory is full", "raise maxmemory, or let it evict (allkeys-lru)"
            case "write":
                return "it is a read-only replica", "name the primary in UPSTASH_REDIS_URL"
            case _:
                return f"its {refusal.name} is exceeded", "ask its vendor for more"

    async def _postgres(self) -> str:
        try:
            return await _in_thread(self._ask_postgres)
        except psycopg.Error as error:
            why = why_unreachable(error)
            raise Fault(f"it cannot be reached: {why.finding}", why.remedy) from None

    def _ask_postgres(self) -> str:
        with self._connect() as connection:
            row = connection.execute("SELECT pg_is_in_recovery(), pg_backend_pid()").fetchone()
            if row and row[0]:
                raise Fault("it is a read-only replica", "name the primary in DB_HOST")
            version = connection.info.server_version
            # A pooler gives its clients process ids that are not PostgreSQL's.
            pooled = row is not None and row[1] != connection.info.backend_pid
        return (
            f"PostgreSQL {version // 10000}.{version % 10000} reads and writes"
            f"{', through a pooler' if pooled else ''}"
        )

    async def _tables(self) -> str:
        return await _in_thread(self._ask_tables)

    def _ask_tables(self) -> str:
        try:
            unmet = unmet_for_serving(self._target.conninfo)
            missing = pending(self._target.conninfo)
        except MigrationError:
            raise Fault("they cannot be looked at", "may DB_USER read them?") from None
        if missing:
            unmet.append(f"not migrated: {', '.join(missing)}")
        if unmet:
            raise Fault("; ".join(unmet), "sottovoce migrate, or as each of them says")
        return "all there and migrated"

    async def _audit(self) -> str:
        return await _in_thread(self._ask_audit)

    def _ask_audit(self) -> str:
        try:
            with self._connect() as connection:
                rows = connection.execute(
                    "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass('chat_audit')"
                    " AND tgenabled IN ('O', 'A')"
                ).fetchall()
        except psycopg.Error:
            raise Fault("it cannot be looked at", "may DB_USER read it?") from None
        if absent := TRIGGERS - {row[0] for row in rows}:
            raise Fault(
                f"rows can be changed: no trigger {', '.join(sorted(absent))}",
                "enable them (ALTER TABLE chat_audit ENABLE ALWAYS TRIGGER ...), and ask who "
                "disabled them",
            )
        return "append-only"

    async def _keys(self) -> str:
        if self._target.jwt_key:
            try:
                PemKey(self._target.jwt_key)
            except ValueError:
                raise Fault(
                    "CLERK_JWT_KEY is no PEM of an RSA public key",
                    "copy it from Clerk's dashboard (API keys, JWKS public key)",
                ) from None
            return "CLERK_JWT_KEY"
        host = urlsplit(self._target.issuer).netloc
        finding = f"the issuer's keys cannot be had from {host}"
        remedy = (
            "look at NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY and the way out to that host, or set "
            "CLERK_JWT_KEY; a running server keeps the keys that it has"
        )
        try:
            with trio.fail_after(CLIENT_SECONDS):
                keys = parse_jwks(await fetch_jwks(jwks_url(self._target.issuer)))
        except (httpx.HTTPError, trio.TooSlowError, ValueError, OSError):
            raise Fault(finding, remedy) from None
        return f"{len(keys)} from {host}"

    async def _token(self) -> str:
        if not self._target.token:
            raise Fault(
                "SOTTOVOCE_TOKEN is not set: stream, message and export need a therapist",
                "put a therapist's session token into it, fresh: Clerk's live for one minute",
            )
        keys: KeySource = (
            PemKey(self._target.jwt_key)
            if self._target.jwt_key
            else RemoteKeys(jwks_url(self._target.issuer))
        )
        verifier = TokenVerifier(
            keys,
            issuer=self._target.issuer,
            authorized_parties=self._target.authorized_parties,
        )
        try:
            await verifier.verify(self._target.token)
        except TokenRefused as refused:
            raise Fault(
                f"it is refused: {refused.reason.value}",
                "a fresh one, of the instance that the publishable key names",
            ) from None
        return "verified"

    async def _stream(self) -> str:
        channel_id = self._need_channel()
        async with self._client() as client, open_stream(client, channel_id) as stream:
            return f"connected after {stream.connected * 1000:.0f} ms"

    async def _message(self) -> str:
        channel_id = self._need_channel()
        body = {
            "channelId": channel_id,
            "content": f"A test of the chat by its operator ({self._marker})",
            "clientMessageId": str(self._marker),
        }
        async with self._client() as client, open_stream(client, channel_id) as stream:
            began = trio.current_time()
            answer = await client.post("/api/chat/send", json=body)
            if answer.status_code != 200:
                raise Fault(
                    f"the send got {answer.status_code} {code_of(answer)}",
                    remedy_for(answer.status_code),
                )
            sent = answer.json()["messageId"]
            while sent not in stream.ids:  # noqa: ASYNC110 - once in a run
                await trio.sleep(0.01)
            milliseconds = (trio.current_time() - began) * 1000
            await trio.sleep(ONCE_SECONDS)
        if stream.ids.count(sent) != 1:
            raise Fault("it came more than once", "this is a defect of the server: report it")
        return f"sent, and heard once after {milliseconds:.0f} ms"

    async def _export(self) -> str:
        channel_id = self._need_channel()
        async with self._client() as client:
            answer = await client.get("/api/chat/export", params={"channelId": channel_id})
        if answer.status_code != 200:
            raise Fault(
                f"it got {answer.status_code} {code_of(answer)}", remedy_for(answer.status_code)
            )
        if str(self._marker) not in answer.text:
            raise Fault("the message just sent is not in it", "report it: a defect of the server")
        return "has the message"

    def _need_channel(self) -> int:
        if self._target.token and self._target.channel_id:
            return self._target.channel_id
        missing = "a channel" if self._target.token else "a token"
        raise Fault(
            f"not tried without {missing}",
            "SOTTOVOCE_TOKEN and --channel: a therapist's, and one of theirs to send a message to",
        )

    def _client(self) -> httpx.AsyncClient:
        return client_of(self._target.base_url, token=self._target.token)

    def _connect(self) -> "psycopg.Connection[tuple[Any, ...]]":
        options: dict[str, Any] = {
            "connect_timeout": CLIENT_SECONDS,
            "autocommit": True,
            "prepare_threshold": None,  # a pooler would give what is prepared to somebody else
        }
        if isinstance(self._target.conninfo, str):
            return psycopg.connect(self._target.conninfo, **options)
        return psycopg.connect(**self._target.conninfo, **options)


async def _in_thread(ask: Callable[[], str]) -> str:
    """The drivers block; a thread that hangs is left behind, and ends with the process."""
    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
