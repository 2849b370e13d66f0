"""The doctor names from outside what a proxy breaks, and needs no setting of the server."""

from collections.abc import Iterator

import pytest

from tests.support.bad_proxy import Habit, bad_proxy
from tests.support.running import RunningServer, run_command, running_server

pytestmark = [pytest.mark.once]

CHECKS = ["server", "inside", "stream", "message", "resume", "cookie", "export", "heartbeat"]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    # Longer than a check takes, and than the proxy's patience.
    with running_server(SOTTOVOCE_HEARTBEAT_SECONDS="4") as running:
        yield running


def look(server: RunningServer, url: str, *, token: str | None = None) -> dict[str, str]:
    """What it says of each check."""
    done = run_command(
        *("doctor", "--from-outside", "--base-url", url),
        *("--channel", str(server.ready.channel_id)),
        SOTTOVOCE_TOKEN=server.ready.therapist.token if token is None else token,
    )
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert [line.split()[1] for line in lines] == CHECKS
    assert (done.returncode == 0) == all(line.startswith("ok ") for line in lines)
    assert server.ready.therapist.token not in done.stdout
    return {line.split()[1]: line for line in lines}


def failed(said: dict[str, str]) -> set[str]:
    return {name for name, line in said.items() if line.startswith("FAIL")}


def test_through_a_proxy_that_breaks_nothing_all_is_well(server: RunningServer):
    with bad_proxy(server.base_url, "none") as url:
        assert failed(look(server, url)) == set()


@pytest.mark.parametrize(
    ("habit", "checks", "finding"),
    [
        ("buffers", {"stream", "message", "resume", "cookie", "export", "heartbeat"}, "holds it"),
        (
            "compresses",
            {"stream", "message", "resume", "cookie", "export", "heartbeat"},
            "compress",
        ),
        (
            "changes Cache-Control",
            {"stream", "message", "resume", "cookie", "export", "heartbeat"},
            "Cache-Control",
        ),
        ("ends what is silent", {"heartbeat"}, "a silent stream is ended"),
        ("drops Last-Event-ID", {"resume"}, "Last-Event-ID does not arrive"),
        ("drops Cookie", {"cookie"}, "the cookie does not arrive"),
        ("passes everything", {"inside"}, "/metrics and /readyz and /healthz can be read"),
        ("drops Authorization", set(CHECKS), "it refuses the token"),
        ("answers by itself", set(CHECKS), "something else answers 404"),
    ],
)
def test_what_a_proxy_breaks_is_named(
    server: RunningServer, habit: Habit, checks: set[str], finding: str
):
    with bad_proxy(server.base_url, habit) as url:
        said = look(server, url)
    assert failed(said) == checks
    first = next(line for line in said.values() if line.startswith("FAIL"))
    assert finding in first


def test_a_proxy_that_rewrites_host_is_named_though_browsers_of_today_pass(server: RunningServer):
    with bad_proxy(server.base_url, "rewrites Host") as url:
        said = look(server, url)
    assert failed(said) == set()
    assert "SOTTOVOCE_ALLOWED_ORIGINS" in said["cookie"]


def test_without_a_token_it_says_what_it_needs(server: RunningServer):
    with bad_proxy(server.base_url, "none") as url:
        said = look(server, url, token="")
    assert "not tried without a token" in said["stream"]


def test_without_a_url_it_asks_for_one():
    done = run_command("doctor", "--from-outside", "--data-dir", "nowhere")
    assert (done.returncode, "--base-url" in done.stderr) == (2, True)
