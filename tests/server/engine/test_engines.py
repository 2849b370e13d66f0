"""The application under stock Hypercorn's own command line, and what TLS our workers speak."""

import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.engine.options import EngineOptions
from server.engine.worker import hypercorn_config
from tests.support.chat import ROOT, START_SECONDS, Chat, environment, eventually
from tests.support.services import Database
from tests.support.tokens import Signer
from tests.support.wire import WIRE, certificate


@contextmanager
def stock_hypercorn(database: Database, redis_url: str, folder: Path) -> Iterator[Chat]:
    """`hypercorn --worker-class trio server.app:app`, as somebody would type it."""
    signer = Signer()
    log = folder / "log"
    command = [sys.executable, "-m", "hypercorn", "--worker-class", "trio"]
    if WIRE.tls:
        certfile, keyfile = certificate()
        command += ["--certfile", str(certfile), "--keyfile", str(keyfile)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--bind", "127.0.0.1:0", "server.app:app"],
            cwd=ROOT,
            env=environment(database, redis_url, signer),
            stdout=output,
            stderr=output,
        )
    try:
        found = eventually(
            lambda: re.search(r"Running on https?://127\.0\.0\.1:(\d+) ", log.read_text()),
            seconds=START_SECONDS,
        )
        chat = Chat(database, signer, int(found[1]), log)
        chat.process = process
        yield chat
        chat.client.close()
    finally:
        process.terminate()
        try:
            process.wait(START_SECONDS)
        finally:
            process.kill()
            process.wait()


def test_the_application_runs_under_stock_hypercorns_own_command(
    database: Database, redis_url: str, folder: Path
):
    with stock_hypercorn(database, redis_url, folder) as chat:
        eventually(lambda: chat.client.get("/readyz").status_code == 200)
        pair = chat.pair()
        chat.send(pair.therapist, pair.channel_id, "before")
        with chat.stream(pair.channel_id, pair.prospect, {"last-event-id": "0"}) as events:
            assert events.connected().message()["text"] == "before"
            sent = chat.send(pair.therapist, pair.channel_id, "now")
            assert events.message()["id"] == sent["messageId"]
        answer = chat.post("/api/chat/send", pair.prospect, b"{")
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_JSON")
        chat.process.send_signal(signal.SIGTERM)
        assert chat.process.wait(START_SECONDS) == 0
        assert "Traceback" not in chat.log.read_text()


def test_tls_begins_at_1_2_and_offers_http_2_first():
    certfile, keyfile = certificate()
    config = hypercorn_config(EngineOptions(certfile=certfile, keyfile=keyfile))
    assert config.alpn_protocols == ["h2", "http/1.1"]
    context = config.create_ssl_context()
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_without_a_certificate_no_tls_is_spoken():
    assert hypercorn_config(EngineOptions()).create_ssl_context() is None
