"""Every setting: one frozen struct, read from the environment once.

Names that deployments already use are kept; ours begin with SOTTOVOCE_. msgspec converts and
checks the values. The README's table is made from this struct.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from protocol.confidential import Secret
from storage.redis.url import check_url, upstash_url


class About(NamedTuple):
    """What the README says of a setting."""

    unit: str
    reason: str


Text = Annotated[str, Meta(min_length=1)]
Names = tuple[Text, ...]
HeaderNames = tuple[Annotated[str, Meta(pattern=r"\A[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")], ...]
"""Tokens of RFC 9110 §5.6.2; `*` is one, and says nothing where cookies are sent."""
Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]  # so that no wait is without end
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=1024)]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]


def setting(env: str, default: Any = msgspec.NODEFAULT) -> Any:
    """A field that is read from the environment variable `env`."""
    return msgspec.field(name=env, default=default)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    # What deployments already set
    chat_feature: Annotated[
        str, About("`true`", "exactly `true` turns the chat on; else every chat endpoint is 404")
    ] = setting("NEXT_PUBLIC_ENABLE_CHAT_FEATURE", "")
    redis_url: Annotated[
        Secret,
        About(
            "URL",
            "`redis://`, `rediss://`, `redis-sentinel://host,host/0#name` or "
            "`redis-cluster://host,host`; or else the next two",
        ),
    ] = setting("UPSTASH_REDIS_URL")
    redis_rest_url: Annotated[
        Secret,
        About("URL", "Upstash's for REST: without UPSTASH_REDIS_URL the TCP address follows"),
    ] = setting("UPSTASH_REDIS_REST_URL", Secret(""))
    redis_rest_token: Annotated[
        Secret, About("text", "beside it: the password of Upstash's user `default`")
    ] = setting("UPSTASH_REDIS_REST_TOKEN", Secret(""))
    db_host: Annotated[
        Text,
        About("hosts, by comma", "names, addresses or a Unix socket's folder; the primary is used"),
    ] = setting("DB_HOST")
    db_port: Annotated[
        str,
        Meta(pattern=r"^[0-9]{1,5}( *, *[0-9]{1,5})*$"),
        About(
            "ports, by comma", "PostgreSQL's or its pooler's: one for all hosts, or one for each"
        ),
    ] = setting("DB_PORT", "5432")
    db_user: Annotated[Text, About("name", "may read and write the chat's tables")] = setting(
        "DB_USER"
    )
    db_password: Annotated[Secret, About("text", "empty where the server asks for none")] = setting(
        "DB_PASSWORD", Secret("")
    )
    db_database: Annotated[Text, About("name", "the main application's database")] = setting(
        "DB_DATABASE"
    )
    db_sslmode: Annotated[
        SslMode,
        About("libpq mode", "conversations cross this wire; `verify-full` where you have the CA"),
    ] = setting("SOTTOVOCE_DB_SSLMODE", "require")
    clerk_publishable_key: Annotated[Text, About("key", "names the issuer of session tokens")] = (
        setting("NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY")
    )
    clerk_secret_key: Annotated[
        Secret, About("key", "accepted and not used: verifying needs public keys only")
    ] = setting("CLERK_SECRET_KEY", Secret(""))
    clerk_jwt_key: Annotated[
        str, About("PEM", "the issuer's public key; with it no key is fetched over the network")
    ] = setting("CLERK_JWT_KEY", "")
    authorized_parties: Annotated[
        Names, About("origins, by comma", "a token's `azp` must be one of them; empty: any")
    ] = setting("SOTTOVOCE_AUTHORIZED_PARTIES", ())
    allowed_origins: Annotated[
        Names,
        About("origins, by comma", "may read cross-origin (CORS) and send with a cookie"),
    ] = setting("SOTTOVOCE_ALLOWED_ORIGINS", ())
    allowed_headers: Annotated[
        HeaderNames,
        About("header names, by comma", "that pages of those origins may send besides the usual"),
    ] = setting("SOTTOVOCE_ALLOWED_HEADERS", ())

    # Streams
    heartbeat_seconds: Annotated[
        Seconds, About("seconds", "of silence; well under the 30 to 60 s idle limits of proxies")
    ] = setting("SOTTOVOCE_HEARTBEAT_SECONDS", 15.0)
    retry_milliseconds: Annotated[
        Count, About("milliseconds", "a client's pause before it reconnects; jittered up to twice")
    ] = setting("SOTTOVOCE_RETRY_MILLISECONDS", 1500)
    outbox_bytes: Annotated[
        Bytes, About("bytes", "that wait for one slow reader; over it the stream ends as `slow`")
    ] = setting("SOTTOVOCE_OUTBOX_BYTES", 256 * 1024)
    stall_seconds: Annotated[
        Seconds, About("seconds", "that a reader may take nothing (also TCP_USER_TIMEOUT)")
    ] = setting("SOTTOVOCE_STALL_SECONDS", 20.0)
    max_streams_per_user: Annotated[
        Count, About("streams, per worker", "a person's tabs and devices; one more ends the oldest")
    ] = setting("SOTTOVOCE_MAX_STREAMS_PER_USER", 10)
    max_streams: Annotated[
        Count, About("streams, per worker", "under the usual file limit of 20,000; then 503")
    ] = setting("SOTTOVOCE_MAX_STREAMS", 18_000)
    max_connections: Annotated[
        Count,
        About("connections, per worker", "in all; the longest idle one makes room, or it is 503"),
    ] = setting("SOTTOVOCE_MAX_CONNECTIONS", 19_000)
    session_lease_seconds: Annotated[
        Seconds,
        About("seconds", "a stream outlives its token's `exp`: Clerk's live for one minute only"),
    ] = setting("SOTTOVOCE_SESSION_LEASE_SECONDS", 300.0)
    recheck_seconds: Annotated[
        Seconds,
        About("seconds", "in which access and subscription of every open stream are looked at"),
    ] = setting("SOTTOVOCE_RECHECK_SECONDS", 30.0)
    max_age_seconds: Annotated[
        Seconds, About("seconds", "no stream lives longer, so that load finds its balance again")
    ] = setting("SOTTOVOCE_MAX_AGE_SECONDS", 4 * 3600.0)
    drain_seconds: Annotated[
        Seconds, About("seconds", "over which streams are ended at shutdown, spread evenly")
    ] = setting("SOTTOVOCE_DRAIN_SECONDS", 10.0)

    # Requests
    max_body_bytes: Annotated[
        Bytes, About("bytes", "the longest message with every character escaped, and room")
    ] = setting("SOTTOVOCE_MAX_BODY_BYTES", 128 * 1024)
    body_seconds: Annotated[
        Seconds, About("seconds", "to the end of a request's body; then 408")
    ] = setting("SOTTOVOCE_BODY_SECONDS", 10.0)
    max_message_characters: Annotated[
        Count, About("characters", "Unicode code points in one message")
    ] = setting("SOTTOVOCE_MAX_MESSAGE_CHARACTERS", 8000)
    max_sends_per_second: Annotated[
        Count, About("messages per second, user and worker", "people type; bursts of twice pass")
    ] = setting("SOTTOVOCE_MAX_SENDS_PER_SECOND", 50)
    forwarded_hops: Annotated[
        int,
        Meta(ge=0, le=8),
        About("proxies", "trusted ones that append to X-Forwarded-For, for the audit's address"),
    ] = setting("SOTTOVOCE_FORWARDED_HOPS", 0)
    trials: Annotated[bool, About("`true` or `false`", "whether `trialing` counts as active")] = (
        setting("SOTTOVOCE_TRIALS", False)
    )

    # Storage
    history_size: Annotated[
        Annotated[int, Meta(ge=1, le=1000)],
        About("messages", "of a channel kept in Redis, and sent to a stream without a cursor"),
    ] = setting("SOTTOVOCE_HISTORY_SIZE", 50)
    history_ttl_seconds: Annotated[
        Count, About("seconds", "that Redis keeps a quiet channel's messages")
    ] = setting("SOTTOVOCE_HISTORY_TTL_SECONDS", 24 * 3600)
    access_cache_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=60)],
        About("seconds", "that access and subscription are believed, unless an eviction comes"),
    ] = setting("SOTTOVOCE_ACCESS_CACHE_SECONDS", 15.0)
    store_seconds: Annotated[
        Seconds, About("seconds", "for one request's storage work; then 503 with Retry-After")
    ] = setting("SOTTOVOCE_STORE_SECONDS", 1.25)
    poll_seconds: Annotated[
        Seconds, About("seconds", "between looks at PostgreSQL while Redis is gone")
    ] = setting("SOTTOVOCE_POLL_SECONDS", 0.25)
    reconcile_seconds: Annotated[
        Seconds, About("seconds", "between looks at PostgreSQL while Redis is well")
    ] = setting("SOTTOVOCE_RECONCILE_SECONDS", 4.0)
    db_connections: Annotated[
        Annotated[int, Meta(ge=2, le=100)],
        About("connections, per worker", "each batch uses one: sends and reads need few"),
    ] = setting("SOTTOVOCE_DB_CONNECTIONS", 8)
    db_connection_seconds: Annotated[
        Annotated[float, Meta(ge=5, le=7 * 86_400)],
        About("seconds", "until a connection is replaced, so that a moved name is followed"),
    ] = setting("SOTTOVOCE_DB_CONNECTION_SECONDS", 300.0)

    # The process
    log_format: Annotated[
        Literal["json", "console"], About("name", "`json` for machines, `console` for people")
    ] = setting("SOTTOVOCE_LOG_FORMAT", "json")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], About("name", "sends and streams are `info`")
    ] = setting("SOTTOVOCE_LOG_LEVEL", "info")

    @property
    def chat_enabled(self) -> bool:
        return self.chat_feature == "true"

    @property
    def issuer(self) -> str:
        """The `iss` of every session token, e.g. `https://clerk.example.com`.

        Raises:
            ValueError: the publishable key does not encode a host.
        """
        return issuer_of(self.clerk_publishable_key)

    @property
    def database_conninfo(self) -> dict[str, Any]:
        """libpq's keywords; holds the password. Of several hosts, the one that can be written to
        is meant: a standby, or a primary that was demoted, refuses every send."""
        return {
            "host": self.db_host,
            "port": self.db_port,
            "target_session_attrs": "read-write",
            "user": self.db_user,
            "password": self.db_password.reveal() or None,
            "dbname": self.db_database,
            "sslmode": self.db_sslmode,
        }

    def __repr__(self) -> str:
        return "<Settings>"


class SettingsError(ValueError):
    """The environment is not usable.

    Attributes:
        findings: a line each; it names the setting and never repeats its value.
    """

    def __init__(self, findings: list[str]) -> None:
        super().__init__(f"{len(findings)} settings are missing or wrong")
        self.findings = findings


def issuer_of(publishable_key: str) -> str:
    """The issuer that a Clerk publishable key names.

    The key is `pk_test_` or `pk_live_` and the base64 of the host and a `$`
    (Clerk docs, "Publishable keys"). A test key of a loopback host means http, for `dev`.

    Raises:
        ValueError: it is not such a key.
    """
    kind, _, encoded = publishable_key.rpartition("_")
    if kind not in ("pk_test", "pk_live"):
        raise ValueError("not a Clerk publishable key")
    try:
        padded = encoded + "=" * (-len(encoded) % 4)
        host = base64.b64decode(padded, validate=True).decode("ascii")
    except ValueError:  # no base64, or no text in it
        raise ValueError("not a Clerk publishable key") from None
    if not host.endswith("$") or not (host := host[:-1]) or urlsplit(f"//{host}").netloc != host:
        raise ValueError("not a Clerk publishable key")
    loopback = urlsplit(f"//{host}").hostname in ("127.0.0.1", "localhost")
    return f"{'http' if loopback and kind == 'pk_test' else 'https'}://{host}"


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from an environment.

    Raises:
        SettingsError: with a finding for each setting that is missing or wrong, and for each
            SOTTOVOCE_ name that no setting has.
    """
    values: dict[str, Any] = {}
    findings: list[str] = []
    hints = get_type_hints(Settings, include_extras=True)
    fields = msgspec.structs.fields(Settings)
    if not environ.get("UPSTASH_REDIS_URL") and any(map(environ.get, _REST)):
        values["redis_url"] = _redis_url(environ, findings)
    for field in fields:
        name = field.encode_name
        raw = environ.get(name, "")
        if raw == "":
            if field.required and field.name not in values:
                findings.append(f"{name} is missing: {_about(hints[field.name]).reason}")
            continue
        try:
            values[field.name] = _convert(raw, hints[field.name])
        except msgspec.ValidationError:
            findings.append(f"{name} is wrong: expected {_expected(hints[field.name])}")
    known = {field.encode_name for field in fields} | {"SOTTOVOCE_TOKEN"}
    findings += [
        f"{name} is not a setting: is it misspelt?"
        for name in sorted(environ)
        if name.startswith("SOTTOVOCE_") and name not in known
    ]
    if "clerk_publishable_key" in values:
        try:
            issuer_of(values["clerk_publishable_key"])
        except ValueError:
            findings.append("NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY is wrong: it does not name a host")
    if (url := values.get("redis_url")) and (wrong := check_url(url)):
        findings.append(f"UPSTASH_REDIS_URL is wrong: {wrong}")
    if wrong := _check_ports(values.get("db_host", ""), values.get("db_port", "5432")):
        findings.append(f"DB_PORT is wrong: {wrong}")
    if findings:
        raise SettingsError(findings)
    return Settings(**values)


_REST = ("UPSTASH_REDIS_REST_URL", "UPSTASH_REDIS_REST_TOKEN")


def _redis_url(environ: Mapping[str, str], findings: list[str]) -> Secret:
    """The TCP address that follows from Upstash's REST address and token; empty, with a finding,
    where it does not."""
    for name in _REST:
        if not environ.get(name):
            findings.append(
                f"{name} is missing: it goes with the other of {' and '.join(_REST)}; or set "
                "UPSTASH_REDIS_URL"
            )
            return Secret("")
    try:
        return upstash_url(*(Secret(environ[name]) for name in _REST))
    except ValueError as error:
        findings.append(f"{_REST[0]} or {_REST[1]} is wrong: {error}")
        return Secret("")


def _check_ports(hosts: str, ports: str) -> str:
    """What is wrong with the ports of these hosts, if anything."""
    if not all(1 <= int(port) <= 65535 for port in ports.split(",")):
        return "expected ports from 1 to 65535"
    count, given = len(hosts.split(",")), len(ports.split(","))
    return "" if given in (1, count) else f"expected one port, or one for each of {count} hosts"


class Doubt(NamedTuple):
    """A setting that can be read, and most likely does not say what was meant."""

    setting: str
    reason: str
    """The rest of the sentence that begins with the setting's name. It never repeats the value."""


def doubtful_settings(environ: Mapping[str, str], settings: Settings) -> list[Doubt]:
    """What a person who starts a server should be told of its settings. Plain.

    Args:
        environ: what `settings` were read from.
    """
    doubts = []
    if (reason := why_chat_is_off(environ)) is not None:
        doubts.append(Doubt(_FLAG, f"{reason}: the chat is off"))
    for field in msgspec.structs.fields(Settings):
        name = field.encode_name
        raw = environ.get(name, "")
        if name == _FLAG or not raw:
            continue
        if raw != raw.strip():
            doubts.append(Doubt(name, "begins or ends with white space, which is a part of it"))
        elif len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"`":
            doubts.append(Doubt(name, "is in quotation marks, which are a part of it"))
    if settings.heartbeat_seconds >= LONG_HEARTBEAT_SECONDS:
        reason = "is 30 s or more: Next.js' rewrites and many proxies end a stream that is silent"
        doubts.append(Doubt("SOTTOVOCE_HEARTBEAT_SECONDS", f"{reason} for so long"))
    origins = {
        "SOTTOVOCE_ALLOWED_ORIGINS": settings.allowed_origins,
        "SOTTOVOCE_AUTHORIZED_PARTIES": settings.authorized_parties,
    }
    for name, listed in origins.items():
        if not all(map(_ORIGIN.fullmatch, listed)):
            reason = "has one that no browser sends: https://host or https://host:port"
            doubts.append(Doubt(name, f"{reason}, in lower case and without a path"))
    return doubts


def why_chat_is_off(environ: Mapping[str, str]) -> str | None:
    """None where it is on; else what is wrong with its setting, to be read after its name."""
    raw = environ.get(_FLAG, "")
    if raw == "true":
        return None
    if not raw:
        return "is not set"
    if raw.strip(" \t\r\n'\"`").lower() in ("true", "1", "t", "yes", "y", "on", "enabled"):
        return "must be `true` to the letter: lower case, no quotation marks, no white space"
    return "is not `true`"


LONG_HEARTBEAT_SECONDS = 30.0
"""Next.js' rewrites end a response that is silent for so long, and they are not the only ones."""

_FLAG = "NEXT_PUBLIC_ENABLE_CHAT_FEATURE"
_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


def _convert(raw: str, kind: Any) -> Any:
    if kind is Secret or get_args(kind)[:1] == (Secret,):
        return Secret(raw)
    if get_origin(get_args(kind)[0]) is tuple:
        parts = [part.strip() for part in raw.split(",") if part.strip()]
        return msgspec.convert(parts, kind)
    return msgspec.convert(raw, kind, strict=False)


def _about(kind: Any) -> About:
    return next(extra for extra in get_args(kind) if isinstance(extra, About))


def _expected(kind: Any) -> str:
    base, *extras = get_args(kind)
    if get_origin(base) is Literal:
        return "one of " + ", ".join(get_args(base))
    if get_origin(base) is tuple:
        return _about(kind).unit
    limits = [
        f"{sign} {limit:g}"
        for extra in extras
        if isinstance(extra, Meta)
        for sign, limit in (("≥", extra.ge), ("≤", extra.le), (">", extra.gt))
        if limit is not None
    ]
    if base is str and any(isinstance(extra, Meta) and extra.pattern for extra in extras):
        return _about(kind).unit
    return " ".join([base.__name__, *limits])


def describe_settings() -> Iterator[tuple[str, str, str, str]]:
    """(environment variable, default, unit, reason) of every setting, for the README."""
    hints = get_type_hints(Settings, include_extras=True)
    for field in msgspec.structs.fields(Settings):
        about = _about(hints[field.name])
        yield field.encode_name, _show_default(field), about.unit, about.reason


def _show_default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default
    if default in ("", (), Secret("")):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
