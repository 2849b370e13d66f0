"""Pages in Chromium behind each recipe of docs/how-to/proxies, while the servers fail.

After each trouble every `EventSource` is back by itself, and each page has been shown every
message once and in order. The pages send all the while.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from storage.embedded import EmbeddedPostgres
from tests.deployment.browser import talking
from tests.deployment.fronts import NEXT, PROXIES, free_port, front
from tests.deployment.servers import Servers, family, frozen, two_servers
from tests.support.chat import own_valkey
from tests.support.services import fresh_database

DOWN_SECONDS = 5.0
"""Both servers: long enough for everybody to ask in vain, some twice."""
FREEZE_SECONDS = 8.0
"""Twice the time after which a recipe, hurried for the tests, gives up on a silent server, and
a little."""

LONG_FREEZE_SECONDS = 40.0
"""More than two heartbeats, and less than any recipe waits."""
AS_IN_PRODUCTION = {
    "SOTTOVOCE_HEARTBEAT_SECONDS": "15",
    "SOTTOVOCE_RETRY_MILLISECONDS": "1500",
    "SOTTOVOCE_DRAIN_SECONDS": "10",
    "SOTTOVOCE_RECHECK_SECONDS": "30",
    "SOTTOVOCE_ACCESS_CACHE_SECONDS": "15",
}
"""The defaults, in place of what tests are served with."""

pytestmark = pytest.mark.timeout(600)  # Next.js builds for a minute where others are at work

NEWEST = [*PROXIES, NEXT[-1]]


def behind(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("url", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def url(
    request: pytest.FixtureRequest,
    running_servers: Servers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    running_servers.start()
    folder = tmp_path_factory.mktemp(request.param)
    with front(request.param, running_servers.ports, folder) as address:
        yield address


@behind(*NEWEST, *NEXT[:-1], "vite")
def test_a_page_hears_and_sends_with_its_cookie(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        talk.check()
        assert set(talk.everybody("failed")) == {0}


@behind(*NEWEST, "vite")
def test_all_come_back_when_one_server_is_restarted(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        servers.one.stop()
        servers.one.start()
        talk.check()


@behind(*NEWEST, *NEXT[:-1], "vite")
def test_all_come_back_when_workers_are_killed(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        for worker in servers.workers():
            worker.kill()
        talk.check()
        assert all(talk.everybody("failed"))


@behind(*NEWEST, *NEXT[:-1], "vite")
def test_all_come_back_when_both_servers_were_down(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        for server in servers:
            server.kill()
        talk.pause(DOWN_SECONDS)
        servers.start()
        talk.check()
        assert all(talk.everybody("failed"))
        assert "unavailable" in talk.closings()


@behind(*NEWEST, "vite")
def test_all_come_back_after_a_freeze(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        with frozen(servers.workers()):
            talk.pause(FREEZE_SECONDS)
        talk.check()


@behind(*NEWEST)
def test_all_move_to_the_other_server_when_one_drains(browser: Browser, url: str, servers: Servers):
    with talking(browser, url, servers) as talk:
        servers.one.stop()
        talk.check()


@behind("nginx", "haproxy")
def test_all_come_back_after_a_roll_with_postgresql_hung(
    browser: Browser, url: str, servers: Servers, postgres: EmbeddedPostgres
):
    with talking(browser, url, servers) as talk:
        with frozen(family(postgres.pid)):
            for server in servers:
                server.roll()
            talk.pause(FREEZE_SECONDS)
        talk.check()


def test_all_come_back_after_a_freeze_of_40_seconds(
    browser: Browser,
    postgres: EmbeddedPostgres,
    migrated_template: str,
    services_folder: Path,
    tmp_path: Path,
):
    """All recipes at once. No time is shortened, neither in their files nor in the servers; but
    for Next.js, which would be built twice."""
    with ExitStack() as cleanup:
        database = cleanup.enter_context(fresh_database(postgres, migrated_template))
        valkey = cleanup.enter_context(own_valkey(services_folder))
        ports = (free_port(), free_port())
        servers = cleanup.enter_context(
            two_servers(database, valkey.url, tmp_path, ports, **AS_IN_PRODUCTION)
        )
        urls = []
        for name in (*NEWEST, "vite"):
            folder = tmp_path / name
            folder.mkdir()
            running = front(name, ports, folder, hurried=name in NEXT)
            urls.append(cleanup.enter_context(running))
        talks = [cleanup.enter_context(talking(browser, url, servers)) for url in urls]
        with frozen(servers.workers()):
            talks[0].pause(LONG_FREEZE_SECONDS)
        for talk in talks:
            talk.check()
