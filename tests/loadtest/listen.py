"""Listens to one channel of a forged server; run by `test_listening` as a process of its own, for
Locust patches what it touches. Arguments: the server's URL, a file of tokens."""

import json
import sys
from pathlib import Path

import gevent
from locust.env import Environment  # first: it patches

from loadtest import listening
from loadtest.listening import Listener
from loadtest.recorder import to_master
from loadtest.session import Options, Session

listening.RETRY_SECONDS = 0.02
HEARTBEAT_SECONDS = 0.3
PATIENCE_SECONDS = 10.0

failures: list[str] = []


def note(name: str, exception: Exception | None, **_: object) -> None:
    if exception is not None:
        failures.append(f"{name}: {exception}")


environment = Environment(host=sys.argv[1])
environment.events.request.add_listener(note)
options = Options(Path(sys.argv[2]), 0.0, HEARTBEAT_SECONDS, 0.0, 1.0, 1.0)
session = Session(environment, options)
session.start()
listener = Listener(session, session.seats.take())
running = gevent.spawn(listener.run)
running.join(PATIENCE_SECONDS)
print(
    json.dumps(
        {
            "ended": running.dead,
            "failures": failures,
            **to_master(session.ledger.tally, session.open),
        }
    )
)
