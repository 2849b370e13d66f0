"""A conversation by way of a Redis that refuses much, over two workers."""

import json
from contextlib import ExitStack

import pytest
import redis

from storage.embedded import EmbeddedValkey
from storage.redis import Keys
from storage.redis.examination import key_pattern
from tests.storage.test_redis_refused import LEAST
from tests.support.chat import Events
from tests.support.running import run_command
from tests.system.test_serve import Deployment, deployment

__all__ = ["deployment"]

STREAMS = 6


@pytest.mark.once
def test_two_workers_hear_each_other_where_all_is_refused_that_is_not_needed(
    deployment: Deployment, valkey: EmbeddedValkey
):
    with redis.Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "least", "on", ">word", *LEAST.split())
    values = deployment.values
    conninfo = {"host": values["DB_HOST"], "port": values["DB_PORT"]}
    conninfo["dbname"] = values["DB_DATABASE"]
    url = f"redis://least:word@127.0.0.1:{valkey.port}"
    deployment.write(UPSTASH_REDIS_URL=url, SOTTOVOCE_RECONCILE_SECONDS="600")
    channel = deployment.people["prospect"].channel_id
    with deployment.serving("--workers", "2") as (_, client), ExitStack() as stack:
        port, headers = client.base_url.port, {"authorization": client.headers["authorization"]}
        assert port is not None
        target = f"/api/chat/{channel}"
        streams = [stack.enter_context(Events(port, target, headers)) for _ in range(STREAMS)]
        for stream in streams:
            stream.connected()
        texts = [f"text {number}" for number in range(10)]
        for text in texts:
            body = {"channelId": channel, "content": text}
            # A connection each, so that both workers have some.
            sent = client.post("/api/chat/send", json=body, headers={"connection": "close"})
            assert sent.status_code == 200
        for stream in streams:
            assert stream.texts(len(texts)) == texts
        assert client.get("/readyz").json()["status"] == "ready"
        environ = {name: str(value) for name, value in deployment.values.items()}
        doctor = run_command("doctor", "--base-url", str(client.base_url), **environ)
        assert "ok   redis — reads, writes, publishes and subscribes" in doctor.stdout
        environ["UPSTASH_REDIS_URL"] = url.replace("word@", "wrong@")
        doctor = run_command("doctor", "--base-url", str(client.base_url), **environ)
        assert "FAIL redis — it refuses the user or the password" in doctor.stdout
        assert "wrong@" not in doctor.stdout
    with redis.Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "least", "resetchannels", "-zadd")
    environ["UPSTASH_REDIS_URL"] = url
    doctor = run_command("doctor", "--base-url", str(client.base_url), **environ)
    pattern = key_pattern(Keys(conninfo))
    assert f"its user may not run zadd; its user may not use pub/sub channels {pattern}" in (
        doctor.stdout
    )
    assert f"ACL SETUSER <its user> +zadd &{pattern} (all it needs: ~{pattern} " in doctor.stdout
    events = [json.loads(line)["event"] for line in deployment.log.splitlines() if line[0] == "{"]
    assert "redis_failed" not in events and "feed_lost" not in events
