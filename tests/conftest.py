"""Real servers for every test that asks for them; one of each for the whole run.

A test that kills or reconfigures a server starts its own (`storage.embedded`).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import settings

from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from tests.support.chat import Chat, own_valkey, run_chat
from tests.support.services import Database, fresh_database, make_template, temporary_folder
from tests.support.wire import WIRE

# An example's time says nothing here: other work shares the machine.
settings.register_profile("shared", settings(), deadline=None)
settings.load_profile("shared")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = [*(["http1"] if WIRE.http2 else []), *(["once"] if WIRE.path != "ours" else [])]
    left_out = {item for item in items if any(map(item.get_closest_marker, marks))}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(scope="session")
def services_folder() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres(services_folder: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(services_folder / "postgres", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(services_folder: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(services_folder / "valkey", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> str:
    return make_template(postgres)


@pytest.fixture
def database(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[Database]:
    """A migrated database of the test's own."""
    with fresh_database(postgres, migrated_template) as fresh:
        yield fresh


@pytest.fixture
def empty_database(postgres: EmbeddedPostgres) -> Iterator[Database]:
    """A database of the test's own with nothing in it."""
    with fresh_database(postgres) as fresh:
        yield fresh


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    """The shared Valkey, emptied."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder that PostgreSQL's system user can reach."""
    with temporary_folder() as fresh:
        yield fresh


@pytest.fixture(scope="session")
def chat(
    postgres: EmbeddedPostgres, migrated_template: str, services_folder: Path
) -> Iterator[Chat]:
    """One worker for all tests that bring their own people and channels."""
    with (
        fresh_database(postgres, migrated_template) as database,
        own_valkey(services_folder) as valkey,
        run_chat(database, valkey.url, services_folder) as running,
    ):
        yield running
