"""What the tests of this folder share: a browser, and two servers with what is before them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from storage.embedded import EmbeddedPostgres
from tests.deployment.browser import chromium
from tests.deployment.fronts import free_port
from tests.deployment.servers import Servers, two_servers
from tests.support.chat import own_valkey
from tests.support.services import fresh_database


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running_servers(
    postgres: EmbeddedPostgres, migrated_template: str, services_folder: Path
) -> Iterator[Servers]:
    with (
        fresh_database(postgres, migrated_template) as database,
        own_valkey(services_folder) as valkey,
        two_servers(database, valkey.url, services_folder, (free_port(), free_port())) as servers,
    ):
        yield servers


@pytest.fixture
def servers(running_servers: Servers) -> Servers:
    """Both of them, ready, whatever the test before has done to them."""
    return running_servers.start()
