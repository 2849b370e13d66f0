"""What a Redis URL may be, and what is said of a wrong one: what to do, and not a word of it."""

import pytest
import redis

from protocol.confidential import Secret
from storage.redis.url import SCHEMES, check_url, connected, open_async, open_cluster, upstash_url

GOOD = [
    "redis://cache",
    "redis://cache:6379/0",
    "redis://:word@cache/15/",
    "redis://:word@cache?db=15",
    "redis://[::1]:6380",
    "redis://user:@cache",
    "rediss://user:p%23%2F%3F%40%25%5B%20%C3%A9@cache",
    "rediss://default:word@main-cat-1.upstash.io:6379/0",
    "rediss://cache?ssl_cert_reqs=none",
    f"rediss://cache?ssl_ca_certs={__file__}",
    "redis-sentinel://a,b:26380,[::1]:26381/2#main",
    "rediss-sentinel://user:p%40ss@a:26379/#main",
    "redis-cluster://a,b:6380,[::1]:6381",
    "rediss-cluster://user:p%40ss@a/",
]

ENCODE = "percent-encode"
ADDRESS = "host:port"
BAD = [
    ("secret", SCHEMES[0]),
    ("unix:///secret", SCHEMES[0]),
    ("redis:/secret", SCHEMES[0]),
    ("REDIS://secret", SCHEMES[0]),
    ("https://:secret@main.upstash.io", "UPSTASH_REDIS_REST_URL"),
    ("http://secret", "UPSTASH_REDIS_REST_URL"),
    (" redis://secret", "remove them"),
    ("redis://secret\n", "remove them"),
    ('"redis://secret"', "remove them"),
    ("'redis://secret'", "remove them"),
    ("redis://:sec ret@cache", ENCODE),
    ("redis://:secret\t@cache", ENCODE),
    ("redis://:secret#word@cache", ENCODE),
    ("redis://:secret/word@cache", ENCODE),
    ("redis://secret:1/word@cache", ENCODE),
    ("redis://:secret?word@cache", ENCODE),
    ("redis://:secret@word@cache", ENCODE),
    ("redis://:secret%word@cache", ENCODE),
    ("redis://:secret%@cache", ENCODE),
    ("redis://:sec[ret@cache", ENCODE),
    ("redis://:sec\u2100ret@cache", ENCODE),
    ("redis://secret#0", ENCODE),
    ("redis://secret@cache", "user:password@"),
    ("redis://", ADDRESS),
    ("redis://:secret@", ADDRESS),
    ("redis://:secret@:6379", ADDRESS),
    ("redis://:secret", ADDRESS),
    ("redis:///0", ADDRESS),
    ("redis://secret:port", ADDRESS),
    ("redis://secret:0", ADDRESS),
    ("redis://secret:65536", ADDRESS),
    ("redis://secret..host", ADDRESS),
    ("redis://secret/word", "number of a database"),
    ("redis://secret/-1", "number of a database"),
    ("redis://secret/\u0663", "number of a database"),
    ("redis://secret?db=word", "number of a database"),
    ("redis://secret/0/1", "number of a database"),
    ("redis://secret,cache", "redis-sentinel://"),
    ("redis://secret?word=1", "ssl_ca_certs"),
    ("redis://secret?word", "ssl_ca_certs"),
    ("redis://secret?protocol=3", "ssl_ca_certs"),
    ("redis://secret?ssl_cert_reqs=none", "with TLS alone"),
    ("rediss://secret?ssl_cert_reqs=maybe", "none, optional or required"),
    ("rediss://secret?ssl_ca_certs=/nowhere", "no file"),
    (f"rediss://secret?ssl_keyfile={__file__}", "ssl_certfile"),
    ("rediss://default:secret@main.upstash.io/1", "database 0"),
    ("rediss://default:secret@main.upstash.io?db=1", "database 0"),
    ("redis://default:secret@main.upstash.io", "rediss://"),
    ("redis-sentinel://secret", "after a #"),
    ("redis-sentinel://:secret#word@cache#main", ENCODE),
    ("redis-sentinel://secret,/0#main", ADDRESS),
    ("redis-sentinel://secret:x/0#main", ADDRESS),
    ("redis-sentinel://secret:70000/0#main", ADDRESS),
    ("redis-sentinel://secret/words#main", "number of a database"),
    ("redis-cluster://secret,", ADDRESS),
    ("redis-cluster://:secret/word@a,b", ENCODE),
    ("redis-cluster://secret/1", "one database"),
    ("redis-cluster://secret#main", "one database"),
    ("redis-cluster://secret?db=1", "ssl_ca_certs"),
]
"""(URL, what is said of it)"""


@pytest.mark.parametrize("url", GOOD)
async def test_what_is_taken_can_be_opened(url: str):
    assert check_url(Secret(url)) is None
    (open_cluster if "cluster" in url else open_async)(Secret(url))


@pytest.mark.parametrize(("url", "said"), BAD)
def test_what_is_wrong_with_a_url_is_said_without_a_word_of_it(url: str, said: str):
    found = check_url(Secret(url))
    assert found is not None and "\n" not in found
    assert said in found
    assert "secret" not in found and "word" not in found.replace("password", "")


def test_a_password_reaches_the_server_as_it_was_before_it_was_encoded():
    with connected(Secret("redis://us%65r:p%23%2F%3F%40%25%3A%20%C3%A9@cache:7000/3")) as client:
        assert isinstance(client, redis.Redis)
        options = client.get_connection_kwargs()
    chosen = {name: options[name] for name in ("host", "port", "username", "password", "db")}
    assert chosen == {
        "host": "cache",
        "port": 7000,
        "username": "user",
        "password": "p#/?@%: é",
        "db": 3,
    }


def test_upstashs_tcp_address_follows_from_its_rest_address():
    found = upstash_url(Secret("https://main-cat-1.upstash.io"), Secret("AX/y+z=#"))
    assert found.reveal() == "rediss://default:AX%2Fy%2Bz%3D%23@main-cat-1.upstash.io:6379"
    assert (
        upstash_url(Secret("https://a.upstash.io/"), Secret("t"))
        .reveal()
        .endswith("@a.upstash.io:6379")
    )


@pytest.mark.parametrize(
    "rest_url",
    [
        "secret",
        "http://secret.upstash.io",
        "https://",
        "https://secret.upstash.io:443",
        "https://secret.upstash.io/pipeline",
        "https://secret..upstash.io",
        "https://user:secret@a.upstash.io",
        "rediss://secret.upstash.io",
        "'https://secret.upstash.io'",
        "https://secret[.upstash.io",
    ],
)
def test_another_rest_address_is_refused_without_a_word_of_it(rest_url: str):
    with pytest.raises(ValueError, match=r"expected|remove them") as refused:
        upstash_url(Secret(rest_url), Secret("t"))
    assert "secret" not in str(refused.value)
