"""Everything that is measured, as Locust's own statistics: they are in its web page, its HTML
report and its CSV, and add up over its workers, like those of any request.

What has a duration is a request of type STREAM or POST. What must not happen is a failure of a
name of its own. What is looked at once a second is a GAUGE: its "response times" are the values
seen, in the unit that its name says, so that median, minimum and maximum are to be read as such.
"""

from locust.env import Environment

from loadtest.ledger import Ledger

STREAM, POST, GAUGE = "STREAM", "POST", "GAUGE"
CONNECT = "connect"
FIRST_EVENT = "first event"
DELIVERY = "delivery"
CAUGHT_UP = "delivery after return"
RECONNECT = "reconnect"
SEND = "send"
OPEN = "streams open (count)"
RATE = "delivery rate (%)"
CPU = "generator CPU (% of a core)"
LAG = "generator lag (ms)"
MEMORY = "generator memory (MB)"


class Figures:
    """Of one process. Times are given in seconds.

    Args:
        environment: Locust's.
        ledger: whose tally is kept along.
    """

    def __init__(self, environment: Environment, ledger: Ledger) -> None:
        self._environment = environment
        self._ledger = ledger
        self._fire = environment.events.request.fire

    def connected(self, seconds: float) -> None:
        """From connecting to the response's head."""
        self._ledger.tally.connects += 1
        self._took(STREAM, CONNECT, seconds)

    def connect_failed(self, seconds: float, why: str) -> None:
        self._ledger.tally.connects += 1
        self._ledger.tally.connect_failures += 1
        self._took(STREAM, CONNECT, seconds, why)

    def first_event(self, seconds: float) -> None:
        """From connecting to `connected`."""
        self._took(STREAM, FIRST_EVENT, seconds)

    def reconnected(self, seconds: float) -> None:
        """From losing a stream to `connected` on the next one, the pause between included."""
        self._ledger.tally.reconnects += 1
        self._took(STREAM, RECONNECT, seconds)

    def ended_by_server(self) -> None:
        self._ledger.tally.ended_by_server += 1

    def delivered(self, seconds: float, size: int) -> None:
        """From the moment that a send was due to its event on a stream that was open then."""
        self._took(STREAM, DELIVERY, seconds, size=size)

    def caught_up(self, size: int) -> None:
        """A message that was sent while its reader was away."""
        self._took(STREAM, CAUGHT_UP, None, size=size)

    def lost(self, count: int, settle_seconds: float) -> None:
        for _ in range(count):
            self._took(STREAM, DELIVERY, None, f"not there after {settle_seconds:g} s")

    def duplicate(self) -> None:
        self._wrong("duplicate", "a message was shown twice")

    def reordering(self) -> None:
        self._wrong("reordering", "a message came after a later one")

    def gap(self) -> None:
        self._wrong("gap", "messages were left out")

    def leak(self) -> None:
        self._ledger.tally.leaks += 1
        self._wrong("leak", "a message of another channel")

    def lost_heartbeat(self) -> None:
        self._ledger.tally.lost_heartbeats += 1
        self._wrong("lost heartbeat", "an open stream was silent for two heartbeats")

    def posted(self, name: str, seconds: float, size: int) -> None:
        self._took(POST, name, seconds, size=size)

    def post_failed(self, name: str, seconds: float, why: str) -> None:
        if name == SEND:
            self._ledger.tally.send_failures += 1
        self._took(POST, name, seconds, why)

    def gauge(self, name: str, value: float) -> None:
        """Not part of Locust's total: it is no request."""
        self._environment.stats.get(name, GAUGE).log(value, 0)

    def _wrong(self, name: str, why: str) -> None:
        self._took(STREAM, name, None, why)

    def _took(
        self,
        kind: str,
        name: str,
        seconds: float | None,
        error: str | None = None,
        *,
        size: int = 0,
    ) -> None:
        """An error names nobody: Locust counts those with equal words."""
        self._fire(
            request_type=kind,
            name=name,
            response_time=None if seconds is None else seconds * 1e3,
            response_length=size,
            exception=error,
            context={},
        )
