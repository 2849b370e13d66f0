"""The tables of main applications as they are met, a .sql file for each layout.

`guide` and `application` are those that issue 13 names, literally; the others are hostile. All of
them hold the same people, channels and old messages, under the same ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.chat import Chat, Person, environment
from tests.support.running import clean_environment, running_serve
from tests.support.services import Database
from tests.support.tokens import Signer

LAYOUTS = ("guide", "application", "enums", "narrow", "tenants", "busy")

REMEDIES = {
    "tenants": """
        ALTER TABLE chat_channels ALTER region SET DEFAULT 'eu';
        ALTER TABLE chat_messages
            ALTER tenant_id SET DEFAULT '00000000-0000-4000-8000-000000000000';
    """
}
"""What somebody must do to a layout before `sottovoce migrate` takes it."""

TESS = Person(1, "user_tess", "tess@example.com", "Tess", "Ott", therapist_id=11)
PIA = Person(2, "user_pia", "pia@example.com", "Pia", "Lund")
NONA = Person(3, "user_nona", "", "", "")
"""Has no name, and no e-mail address where the layout lets her have none."""
GONE = Person(4, "user_gone", "gone@example.com", "Gus", "Orr")
"""An account that is not active."""
LAPSED = Person(5, "user_lapsed", "lapsed@example.com", "Lana", "Moss")
SUE = Person(6, "user_sue", "sue@example.com", "Sue", "Acme")
"""Sponsored by her employer or a group of hers; absent where the layout has neither."""
LEE = Person(7, "user_lee", "lee@example.com", "Lee", "Roe", therapist_id=12)
"""A therapist who was deleted where the layout has `deleted_at`."""
NELE = Person(8, "user_nele", "nele@example.com", "Nele", "Voss")
"""Has no channel yet."""
BO = Person(9, "user_bo", "bo@example.com", "Bo", "Lock")
ARI = Person(10, "user_ari", "ari@example.com", "Ari", "Kive")

WITH_PIA, WITH_NONA, BLOCKED, ARCHIVED, WITH_GONE, OF_LEE, WITH_SUE, WITH_LAPSED = range(1, 9)
"""The channels, Tess's but for one."""


def make_layout(database: Database, name: str, *, remedied: bool = False) -> None:
    """Make a main application's tables and fill them.

    Args:
        remedied: whether what `sottovoce migrate` refuses of them has been put right.
    """
    database.execute((Path(__file__).parent / f"{name}.sql").read_text("utf-8"))
    if remedied and name in REMEDIES:
        database.execute(REMEDIES[name])


@contextmanager
def serving(
    database: Database,
    redis_url: str,
    folder: Path,
    *,
    workers: int = 2,
    port: int = 0,
    **settings: str,
) -> Iterator[Chat]:
    """`sottovoce serve` on a migrated database while the block lasts.

    Args:
        folder: its log goes there.
        port: 0 chooses a free one.
        settings: over those of `chat.environment`.
    """  # fmt: skip
    signer = Signer()
    log = folder / "serve.log"
    many = {"SOTTOVOCE_MAX_STREAMS_PER_USER": "500"}
    environ = clean_environment({**environment(database, redis_url, signer), **many, **settings})
    with running_serve(environ, log, "--workers", str(workers), port=port) as url:
        chat = Chat(database, signer, int(url.rpartition(":")[2]), log)
        try:
            yield chat
        finally:
            chat.client.close()
