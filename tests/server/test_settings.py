"""The settings: each finding names its setting, says what is expected, and repeats no value."""

import base64
import math
import secrets

import msgspec
import pytest

from protocol.confidential import Secret
from server.settings import (
    Settings,
    SettingsError,
    describe_settings,
    doubtful_settings,
    issuer_of,
    load_settings,
)
from tests.storage.test_redis_url import BAD

SECRET = "s3cReT" + secrets.token_hex(8)


def key_of(host: str, kind: str = "pk_test", end: str = "$") -> str:
    return f"{kind}_{base64.b64encode((host + end).encode()).decode()}"


MINIMAL = {
    "UPSTASH_REDIS_URL": f"redis://:{SECRET}@cache:6379",
    "DB_HOST": "db",
    "DB_USER": "chat",
    "DB_DATABASE": "main",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": key_of("clerk.example.com"),
}


def findings(**changed: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load_settings({**MINIMAL, **changed})
    assert SECRET not in repr(refused.value) + str(refused.value)
    return refused.value.findings


def test_the_least_that_is_needed():
    settings = load_settings(MINIMAL)
    assert settings.redis_url.reveal() == MINIMAL["UPSTASH_REDIS_URL"]
    assert settings.database_conninfo == {
        "host": "db",
        "port": "5432",
        "target_session_attrs": "read-write",
        "user": "chat",
        "password": None,
        "dbname": "main",
        "sslmode": "require",
    }
    assert settings.issuer == "https://clerk.example.com"
    assert not settings.chat_enabled, "off unless turned on"


@pytest.mark.parametrize("name", MINIMAL)
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_what_is_missing_is_named(name: str, how: str):
    environ = {**MINIMAL, name: ""}
    if how == "absent":
        del environ[name]
    with pytest.raises(SettingsError) as refused:
        load_settings(environ)
    [finding] = refused.value.findings
    assert finding.startswith(f"{name} is missing: ")


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(SettingsError) as refused:
        load_settings({})
    named = {finding.split(" ")[0] for finding in refused.value.findings}
    assert named == set(MINIMAL)
    assert all("\n" not in finding for finding in refused.value.findings)


WRONG = {
    "DB_PORT": ["0", "65536", "x", "54.32", "-1", "5432,", "5432,x", "5432,0", "5432,5433"],
    "SOTTOVOCE_DB_SSLMODE": ["on", "REQUIRE"],
    "SOTTOVOCE_HEARTBEAT_SECONDS": ["0", "-1", "x", "1s"],
    "SOTTOVOCE_RETRY_MILLISECONDS": ["0", "1.5"],
    "SOTTOVOCE_OUTBOX_BYTES": ["1023", "1 MB"],
    "SOTTOVOCE_STALL_SECONDS": ["0"],
    "SOTTOVOCE_MAX_STREAMS_PER_USER": ["0", "ten"],
    "SOTTOVOCE_MAX_STREAMS": ["-5"],
    "SOTTOVOCE_MAX_BODY_BYTES": ["100"],
    "SOTTOVOCE_MAX_MESSAGE_CHARACTERS": ["0"],
    "SOTTOVOCE_MAX_SENDS_PER_SECOND": ["0"],
    "SOTTOVOCE_FORWARDED_HOPS": ["-1", "9"],
    "SOTTOVOCE_TRIALS": ["yes please", "2"],
    "SOTTOVOCE_HISTORY_SIZE": ["0", "1001"],
    "SOTTOVOCE_ACCESS_CACHE_SECONDS": ["-1", "61"],
    "SOTTOVOCE_DB_CONNECTIONS": ["1", "101"],
    "SOTTOVOCE_DB_CONNECTION_SECONDS": ["4", "700000", "x"],
    "SOTTOVOCE_LOG_FORMAT": ["xml"],
    "SOTTOVOCE_LOG_LEVEL": ["trace", "INFO"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_value_that_does_not_fit_is_named_with_what_is_expected(name: str, value: str):
    [finding] = findings(**{name: value})
    assert finding.startswith(f"{name} is wrong: expected ")
    assert value not in finding.removeprefix(name) or len(value) < 3


def test_several_hosts_have_one_port_or_as_many():
    hosts = {**MINIMAL, "DB_HOST": "db1, db2,/run/postgresql"}
    assert load_settings(hosts | {"DB_PORT": "6432"}).database_conninfo["port"] == "6432"
    assert load_settings(hosts | {"DB_PORT": "1,2, 3"}).database_conninfo["port"] == "1,2, 3"
    [finding] = findings(DB_HOST="db1,db2,db3", DB_PORT="1,2")
    assert finding == "DB_PORT is wrong: expected one port, or one for each of 3 hosts"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("name", ["SOTTOVOCE_HEARTBEAT_SECONDS", "SOTTOVOCE_STORE_SECONDS"])
def test_a_time_is_finite(name: str, value: str):
    [finding] = findings(**{name: value})
    assert finding.startswith(f"{name} is wrong")


REST = {
    "UPSTASH_REDIS_URL": "",
    "UPSTASH_REDIS_REST_URL": "https://main.upstash.io",
    "UPSTASH_REDIS_REST_TOKEN": SECRET + "/#",
}


def test_without_a_url_of_redis_upstashs_rest_address_and_token_say_where_it_is():
    settings = load_settings(MINIMAL | REST)
    assert settings.redis_url.reveal() == f"rediss://default:{SECRET}%2F%23@main.upstash.io:6379"
    assert SECRET not in repr([getattr(settings, name) for name in settings.__struct_fields__])


def test_with_both_the_url_of_redis_wins():
    both = MINIMAL | REST | {"UPSTASH_REDIS_URL": "redis://cache"}
    assert load_settings(both).redis_url.reveal() == "redis://cache"
    both["UPSTASH_REDIS_REST_URL"] = "not looked at"
    assert load_settings(both).redis_url.reveal() == "redis://cache"


@pytest.mark.parametrize("name", ["UPSTASH_REDIS_REST_URL", "UPSTASH_REDIS_REST_TOKEN"])
def test_a_rest_address_needs_its_token_and_a_token_its_address(name: str):
    [finding] = findings(**REST | {name: ""})
    assert finding.startswith(f"{name} is missing: ")
    assert "UPSTASH_REDIS_URL" in finding


@pytest.mark.parametrize(
    "changed",
    [
        {"UPSTASH_REDIS_REST_URL": f"https://{SECRET}.upstash.io/path"},
        {"UPSTASH_REDIS_REST_URL": f"rediss://{SECRET}.upstash.io"},
        {"UPSTASH_REDIS_REST_TOKEN": f'"{SECRET}"'},
    ],
)
def test_a_rest_address_or_token_that_is_wrong_is_named(changed: dict[str, str]):
    [finding] = findings(**REST | changed)
    assert finding.startswith("UPSTASH_REDIS_REST_URL or UPSTASH_REDIS_REST_TOKEN is wrong: ")


@pytest.mark.parametrize(("url", "said"), BAD)
def test_a_url_of_redis_that_is_wrong_is_named_with_what_to_do(url: str, said: str):
    [finding] = findings(UPSTASH_REDIS_URL=url)
    assert finding.startswith("UPSTASH_REDIS_URL is wrong: ")
    assert said in finding and "secret" not in finding


def test_a_name_of_ours_that_no_setting_has_is_noticed():
    assert findings(SOTTOVOCE_MAX_STREAM="5") == [
        "SOTTOVOCE_MAX_STREAM is not a setting: is it misspelt?"
    ]


def test_other_peoples_names_are_none_of_our_business():
    load_settings({**MINIMAL, "PATH": "/bin", "DB_HOSTNAME": "x", "sottovoce_x": "y"})


@pytest.mark.parametrize(("value", "on"), [("true", True), ("false", False), ("", False)])
def test_only_true_turns_the_chat_on(value: str, on: bool):
    settings = load_settings({**MINIMAL, "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": value})
    assert settings.chat_enabled is on


@pytest.mark.parametrize("value", ["True", "TRUE", "1", "yes", "on", "true ", " true", '"true"'])
def test_what_only_resembles_true_leaves_the_chat_off(value: str):
    settings = load_settings({**MINIMAL, "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": value})
    assert not settings.chat_enabled


@pytest.mark.parametrize(("value", "on"), [("true", True), ("false", False), ("1", True)])
def test_trials_are_on_or_off(value: str, on: bool):
    assert load_settings({**MINIMAL, "SOTTOVOCE_TRIALS": value}).trials is on


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("https://a.example", ("https://a.example",)),
        (" https://a.example , https://b.example ,", ("https://a.example", "https://b.example")),
        (" , ", ()),
    ],
)
def test_origins_are_separated_by_commas(value: str, names: tuple[str, ...]):
    assert load_settings({**MINIMAL, "SOTTOVOCE_ALLOWED_ORIGINS": value}).allowed_origins == names


def test_no_secret_is_printed():
    environ = {
        **MINIMAL,
        "DB_PASSWORD": SECRET,
        "CLERK_SECRET_KEY": SECRET,
        "CLERK_JWT_KEY": SECRET,
    }
    settings = load_settings(environ)
    assert settings.db_password.reveal() == SECRET
    assert settings.database_conninfo["password"] == SECRET
    assert SECRET not in repr(settings) + str(settings) + f"{settings}" + repr([settings])
    assert SECRET not in repr([getattr(settings, name) for name in ("redis_url", "db_password")])


def test_no_finding_repeats_a_value():
    everything = {field.encode_name: SECRET for field in msgspec.structs.fields(Settings)}
    with pytest.raises(SettingsError) as refused:
        load_settings(everything)
    assert len(refused.value.findings) > 20
    assert SECRET not in repr(refused.value.findings)


# Whose tokens


@pytest.mark.parametrize(
    ("key", "issuer"),
    [
        (key_of("clerk.example.com"), "https://clerk.example.com"),
        (key_of("clerk.example.com", "pk_live"), "https://clerk.example.com"),
        (key_of("clerk.example.com:8443"), "https://clerk.example.com:8443"),
        (key_of("clerk.example.com").rstrip("="), "https://clerk.example.com"),
        (key_of("127.0.0.1:9999"), "http://127.0.0.1:9999"),
        (key_of("localhost:9999"), "http://localhost:9999"),
        (key_of("127.0.0.1:9999", "pk_live"), "https://127.0.0.1:9999"),
        (key_of("localhost.evil.example"), "https://localhost.evil.example"),
        (key_of("127.0.0.1.evil.example"), "https://127.0.0.1.evil.example"),
    ],
)
def test_a_publishable_key_names_its_issuer(key: str, issuer: str):
    assert issuer_of(key) == issuer
    settings = load_settings({**MINIMAL, "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": key})
    assert settings.issuer == issuer


@pytest.mark.parametrize(
    "key",
    [
        "",
        "pk_test",
        "pk_test_",
        "pk_test_!!!",
        "pk_test_é",
        key_of("clerk.example.com", end=""),
        key_of("", end="$"),
        key_of("clerk.example.com/path"),
        key_of("user@clerk.example.com/x"),
        key_of("clerk.example.com?x"),
        key_of("clerk.example.com#x"),
        key_of("clerk.example.com", "sk_test"),
        key_of("clerk.example.com", "pk_other"),
        key_of("clerk.example.com", "PK_TEST"),
    ],
)
def test_what_is_no_publishable_key_is_refused(key: str):
    with pytest.raises(ValueError, match=r"^not a Clerk publishable key$"):
        issuer_of(key)
    if key:
        assert findings(NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY=key) == [
            "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY is wrong: it does not name a host"
        ]


# The README's table


def test_every_setting_is_described():
    rows = list(describe_settings())
    assert len(rows) == len(msgspec.structs.fields(Settings))
    for name, default, unit, reason in rows:
        assert name.isupper()
        assert default
        assert unit
        assert reason
        assert "|" not in default + unit + reason, "it would break the table"
    assert {row[0] for row in rows if row[1] == "required"} == set(MINIMAL)


def test_the_defaults_are_consistent():
    settings = load_settings(MINIMAL)
    assert settings.max_body_bytes > 12 * settings.max_message_characters, "all escaped, and room"
    assert settings.outbox_bytes > settings.max_body_bytes, "any one message fits"
    assert settings.heartbeat_seconds < 30, "proxies give up after 30 to 60 s"
    assert settings.max_age_seconds > settings.session_lease_seconds
    for field in msgspec.structs.fields(Settings):
        if field.encode_name.endswith("_SECONDS"):
            assert math.isfinite(getattr(settings, field.name))
    assert settings.clerk_secret_key == Secret("")


def doubts(**changed: str) -> dict[str, str]:
    environ = MINIMAL | {FLAG: "true"} | changed
    found = doubtful_settings(environ, load_settings(environ))
    assert SECRET not in str(found)
    return dict(found)


FLAG = "NEXT_PUBLIC_ENABLE_CHAT_FEATURE"


def test_settings_that_say_what_they_mean_raise_no_doubt():
    assert doubts() == {}
    origins = "https://app.example.com,http://localhost:3000"
    assert doubts(SOTTOVOCE_ALLOWED_ORIGINS=origins, SOTTOVOCE_HEARTBEAT_SECONDS="29.9") == {}
    assert doubts(DB_PASSWORD=f"{SECRET}'", CLERK_JWT_KEY="-----BEGIN") == {}


@pytest.mark.parametrize("value", ["TRUE", "True", "1", "yes", "on", '"true"', " true", "true\r"])
def test_a_chat_that_is_off_because_of_how_true_is_written_is_named(value: str):
    assert "to the letter" in doubts(**{FLAG: value})[FLAG]


@pytest.mark.parametrize(("value", "why"), [("", "is not set"), ("false", "is not `true`")])
def test_a_chat_that_is_off_is_named_with_the_reason(value: str, why: str):
    assert doubts(**{FLAG: value}) == {FLAG: f"{why}: the chat is off"}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DB_PASSWORD", f"'{SECRET}'", "quotation marks"),
        ("DB_PASSWORD", f"{SECRET} ", "white space"),
        ("DB_HOST", '"db"', "quotation marks"),
        ("DB_USER", "chat\r", "white space"),
        ("SOTTOVOCE_HEARTBEAT_SECONDS", "30", "Next.js"),
        ("SOTTOVOCE_ALLOWED_ORIGINS", "https://app.example.com/", "without a path"),
        ("SOTTOVOCE_ALLOWED_ORIGINS", "https://a.example,app.example.com", "no browser sends"),
        ("SOTTOVOCE_ALLOWED_ORIGINS", "*", "no browser sends"),
        ("SOTTOVOCE_AUTHORIZED_PARTIES", "https://App.example.com", "lower case"),
    ],
)
def test_a_value_that_is_hardly_meant_so_is_named(name: str, value: str, why: str):
    found = doubts(**{name: value})
    assert list(found) == [name] and why in found[name]


@pytest.mark.parametrize(
    "value", ["X Trace", "X-Trace\r\nSet-Cookie: a", "X-Trace:", "X-Trace, é", "(x)", "a;b"]
)
def test_allowed_headers_are_header_names(value: str):
    [finding] = findings(SOTTOVOCE_ALLOWED_HEADERS=value)
    assert finding == "SOTTOVOCE_ALLOWED_HEADERS is wrong: expected header names, by comma"


def test_allowed_headers_are_kept_as_they_are_written():
    settings = load_settings({**MINIMAL, "SOTTOVOCE_ALLOWED_HEADERS": "X-Trace , traceparent,"})
    assert settings.allowed_headers == ("X-Trace", "traceparent")
