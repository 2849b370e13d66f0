"""`sottovoce dev` as people use it: one command up, one Ctrl-C down, and what lies between."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import jwt
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from tests.support.running import (
    RunningServer,
    read_lines,
    run_command,
    running_server,
    wait_until,
)
from tests.support.wire import WIRE

PEOPLE = ("therapist", "prospect", "outsider", "lapsed")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(workers=2) as running:
        yield running


def send(server: RunningServer, person: str, text: str, channel_id: int | None = None) -> int:
    """The status of a send."""
    body = {"channelId": channel_id or server.ready.channel_id, "content": text}
    with server.client(person) as client:
        return client.post("/api/chat/send", json=body).status_code


def texts(server: RunningServer) -> list[str]:
    body = {"action": "get_messages", "channelId": server.ready.channel_id}
    with server.client() as client:
        answer = client.post("/api/chat/messaging", json=body).json()
    return [message["content"] for message in answer["messages"]]


def wait_until_gone(processes: list[psutil.Process], *, seconds: float = 10) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


def test_the_ready_file_says_everything(server: RunningServer):
    ready = server.ready
    pids = ready.pids
    assert pids.supervisor == server.process.pid
    assert len(pids.workers) == 2
    running = {process.pid for process in server.processes()}
    assert {*pids.workers, pids.postgres, pids.redis} < running
    assert len({getattr(ready, person).user_id for person in PEOPLE}) == 4
    assert len({getattr(ready, person).token for person in PEOPLE}) == 4
    assert ready.lapsed.channel_id not in (None, ready.channel_id)
    assert ready.prospect.channel_id is None
    assert "PRIVATE KEY" in Path(ready.jwt_key_file).read_text()
    claims = jwt.decode(ready.prospect.token, options={"verify_signature": False})
    assert claims["iss"] == ready.issuer
    assert claims["exp"] - claims["iat"] == 24 * 3600
    keys = httpx.get(f"{ready.issuer}/.well-known/jwks.json", trust_env=False).json()["keys"]
    assert jwt.get_unverified_header(ready.prospect.token)["kid"] == keys[0]["kid"]


def test_what_it_writes_for_scripts_is_the_owners_alone(server: RunningServer):
    for path in (server.data_dir / "ready.json", Path(server.ready.jwt_key_file)):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("person", "channel", "status"),
    [
        ("therapist", "channel", 200),
        ("prospect", "channel", 200),
        ("outsider", "channel", 403),
        ("lapsed", "channel", 403),
        ("therapist", "lapsed", 200),
        ("lapsed", "lapsed", 403),
    ],
)
def test_everybody_can_do_what_their_part_says(server: RunningServer, person, channel, status):
    number = server.ready.channel_id if channel == "channel" else server.ready.lapsed.channel_id
    assert send(server, person, "hello", number) == status


def test_what_it_prints_can_be_pasted(server: RunningServer):
    stream, post = re.findall("^curl .*$", server.log, re.MULTILINE)
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    reader = subprocess.Popen([*shlex.split(stream), "-sS"], stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        assert any('"connected"' in line for line in reader.stdout)
        sent = subprocess.run(
            [*shlex.split(post), "-sS"], capture_output=True, text=True, timeout=10, check=True
        )
        assert '"success":true' in sent.stdout
        message_id = re.search('"messageId":"([^"]+)"', sent.stdout)
        assert message_id is not None
        assert any(message_id[1] in line for line in reader.stdout)
    finally:
        reader.kill()
        reader.communicate()


def test_a_token_for_anybody_of_any_lifetime(server: RunningServer):
    made = server.command("token", "prospect", "--lifetime", "5").stdout.strip()
    with server.client(None, headers={"Authorization": f"Bearer {made}"}) as client:
        assert client.get("/api/chat/availability").json()["role"] == "prospect"
    claims = jwt.decode(made, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 5
    stranger = server.command("token", "user_somebody").stdout.strip()
    with server.client(None, headers={"Authorization": f"Bearer {stranger}"}) as client:
        assert client.get("/api/chat/availability").status_code == 404


def test_seeded_pairs_can_talk_and_each_run_makes_new_ones(server: RunningServer, folder: Path):
    channels = []
    for run in range(2):
        out = folder / f"{run}.ndjson"
        assert server.command("seed", "--channels", "30", "--out", str(out)).returncode == 0
        assert out.stat().st_mode & 0o077 == 0
        lines = read_lines(out)
        assert len(lines) == 30
        assert all(
            set(line) == {"channel_id", "therapist_token", "prospect_token"} for line in lines
        )
        channels += [line["channel_id"] for line in lines]
        with server.client(None) as client:
            for line in (lines[0], lines[-1]):
                for token in ("therapist_token", "prospect_token"):
                    answer = client.post(
                        "/api/chat/send",
                        json={"channelId": line["channel_id"], "content": "hello"},
                        headers={"Authorization": f"Bearer {line[token]}"},
                    )
                    assert answer.status_code == 200
            crossed = client.post(
                "/api/chat/send",
                json={"channelId": lines[0]["channel_id"], "content": "hello"},
                headers={"Authorization": f"Bearer {lines[1]['therapist_token']}"},
            )
            assert crossed.status_code == 403
    assert len(set(channels)) == 60


def test_its_database_is_migrated(server: RunningServer):
    assert server.command("migrate", "--check").returncode == 0


def test_a_second_one_on_the_same_folder_is_refused_and_the_first_goes_on(server: RunningServer):
    second = server.command("dev", "--port", "0")
    assert second.returncode == 2
    assert "another sottovoce dev is running" in second.stderr
    assert send(server, "therapist", "still here") == 200
    assert server.reload_ready().base_url == server.base_url


def test_a_port_that_is_taken_is_named_and_nothing_is_started(server: RunningServer, folder: Path):
    port = str(httpx.URL(server.base_url).port)
    second = run_command("dev", "--port", port, "--data-dir", str(folder / "data"))
    assert second.returncode == 2
    assert f"port {port}" in second.stderr
    assert not (folder / "data" / "postgres").exists()


def test_a_worker_that_is_killed_is_replaced_and_the_ready_file_follows(server: RunningServer):
    before = server.reload_ready().pids.workers
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: server.reload_ready().pids.workers != before)
    after = server.ready.pids.workers
    assert len(after) == 2 and before[1] in after
    assert all(map(psutil.pid_exists, after))
    assert all(send(server, "prospect", "both answer") == 200 for _ in range(4))


def test_ctrl_c_ends_everything_and_a_second_start_keeps_its_data(folder: Path):
    data_dir = folder / "data"
    with running_server(data_dir=data_dir) as first:
        assert send(first, "prospect", "remember me") == 200
        old = first.ready
        processes = first.processes()
        assert len(processes) >= 4
        assert first.stop(signal.SIGINT) == 0
        wait_until_gone(processes)
        assert not (data_dir / "ready.json").exists()
        assert "Traceback" not in first.log
    with running_server(data_dir=data_dir) as second:
        assert second.ready.issuer == old.issuer
        assert second.ready.channel_id == old.channel_id
        assert "remember me" in texts(second)
        with second.client(None, headers=first.headers("prospect")) as client:
            assert client.get("/api/chat/availability").status_code == 200
        processes = second.processes()
        second.process.kill()
        second.process.wait()
        wait_until_gone(processes)
    # What a kill leaves behind is not in the next one's way.
    with running_server(data_dir=data_dir) as third:
        assert "remember me" in texts(third)


def test_ctrl_c_at_the_terminal_reaches_nobody_but_dev(server: RunningServer):
    """A terminal sends SIGINT to its whole foreground group: the others must not be in it."""
    group = os.getpgid(server.process.pid)
    pids = server.reload_ready().pids
    assert all(os.getpgid(pid) != group for pid in (*pids.workers, pids.postgres, pids.redis))


def test_open_streams_are_told_before_it_ends():
    with running_server(SOTTOVOCE_DRAIN_SECONDS="0.2") as server:
        with (
            server.client("prospect", timeout=20) as client,
            client.stream("GET", f"/api/chat/{server.ready.channel_id}") as response,
        ):
            lines = response.iter_lines()
            assert any('"connected"' in line for line in lines)
            server.process.send_signal(signal.SIGINT)
            told = list(lines)
        assert "event: closing" in told
        assert any('"drain"' in line for line in told)
        assert server.process.wait(20) == 0


def test_port_settings_and_flag_are_the_callers():
    """With the chat off it starts all the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running_server(
        port=port,
        NEXT_PUBLIC_ENABLE_CHAT_FEATURE="false",
        SOTTOVOCE_LOG_FORMAT="json",
        DB_HOST="192.0.2.1",  # its own services are not the caller's
        UPSTASH_REDIS_URL="redis://192.0.2.1",
    ) as server:
        assert server.base_url == f"{WIRE.scheme}://127.0.0.1:{port}"
        with server.client() as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/api/chat/availability").status_code == 404
        assert '"event":"worker_ready"' in server.log
