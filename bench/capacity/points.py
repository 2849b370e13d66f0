"""What is measured, and where: the points of the fit, and those that are held out of it.

The held-out points were chosen before anything was fitted. They combine what the others vary one
by one; `model` never sees them, and they say how well it predicts.
"""

from collections.abc import Sequence

import msgspec

HEARTBEAT_SECONDS = 15.0
"""The server's default."""
ACCESS_SECONDS = 15.0
"""SOTTOVOCE_ACCESS_CACHE_SECONDS: who sends again on a channel within it is not looked up again."""
SOON = 1.5
"""The same where it is measured. What a window of seconds has of look-ups would else depend on who
was looked up in those before it; now it is even within the time that a load is kept up before."""
CHARACTERS = 100
"""Of a message: a sentence or two."""
SINGLES = 500
"""Channels with one stream each, whose other person is away."""
GROUPS = 100
"""Channels with `GROUP_STREAMS` streams each: two people with three devices."""
GROUP_STREAMS = 6


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Work for the whole deployment, however many workers share it."""

    workers: int = 1
    streams: int = 0
    heartbeat: float = HEARTBEAT_SECONDS
    """Seconds of silence after which a stream gets one."""
    sends: float = 0.0
    """A second, at random moments, to random channels of those that have `fanout` streams."""
    fanout: int = 2
    """Streams on the channels that talk: 1, 2 or `GROUP_STREAMS`."""
    connects: float = 0.0
    """New streams a second, each with a token not seen before and 20 messages of history; each
    leaves again after two seconds."""
    characters: int = CHARACTERS
    access_seconds: float = ACCESS_SECONDS

    @property
    def name(self) -> str:
        """Says what is not usual."""
        parts = [f"{self.streams:,} streams", f"{self.sends:g} sends/s × {self.fanout}"]
        if self.connects:
            parts.append(f"{self.connects:g} connects/s")
        if self.heartbeat != HEARTBEAT_SECONDS:
            parts.append(f"heartbeat {self.heartbeat:g} s")
        if self.characters != CHARACTERS:
            parts.append(f"{self.characters} characters")
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{workers}: {', '.join(parts)}"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A load that is measured."""

    load: Load
    held_out: bool = False


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a load took.

    `values`, all per second unless their names say otherwise: see `measure.window`.
    """

    load: Load
    held_out: bool
    values: dict[str, float]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Points that one server is measured at, in this order: streams are only added."""

    workers: int
    heartbeat: float
    points: Sequence[Point]

    @property
    def most_streams(self) -> int:
        return max(point.load.streams for point in self.points)


def _session(workers: int, heartbeat: float, rows: Sequence[tuple[float, ...]]) -> Session:
    """Rows: streams, sends, fan-out, connects, characters, and 1 if it is held out."""
    points = []
    for streams, sends, fanout, connects, characters, held_out in rows:
        load = Load(
            workers=workers,
            streams=int(streams),
            heartbeat=heartbeat,
            sends=sends,
            fanout=int(fanout),
            connects=connects,
            characters=int(characters),
            access_seconds=SOON,
        )
        points.append(Point(load=load, held_out=bool(held_out)))
    return Session(workers=workers, heartbeat=heartbeat, points=points)


OFTEN = 6.0
"""Seconds: heartbeats that a window is not too short for."""

# Two workers, PostgreSQL, Valkey and the client share two cores: with more than 600 sends a second
# the one with everything is full, and the same load then takes 0.6 to 1.0 cores of the workers.
FULL = (
    _session(
        1,
        OFTEN,
        [
            (0, 0, 2, 0, 100, 0),
            (2_000, 0, 2, 0, 100, 0),
            (2_000, 50, 2, 0, 100, 0),
            (2_000, 250, 2, 0, 100, 0),
            (2_000, 1_200, 2, 0, 100, 0),
            (2_000, 800, 1, 0, 100, 0),
            (2_000, 500, 6, 0, 100, 0),
            (6_000, 500, 2, 0, 100, 1),
            (12_000, 0, 2, 0, 100, 0),
            (12_000, 100, 2, 0, 100, 0),
            (12_000, 800, 2, 0, 500, 0),
            (18_000, 0, 2, 0, 100, 1),
            (18_000, 400, 2, 0, 100, 0),
            (18_000, 700, 2, 0, 300, 1),
        ],
    ),
    _session(
        1,
        HEARTBEAT_SECONDS,
        [
            (2_000, 0, 2, 0, 100, 0),
            (12_000, 0, 2, 0, 100, 0),
            (12_000, 500, 2, 0, 100, 0),
            (12_000, 0, 2, 60, 100, 0),
            (12_000, 0, 2, 250, 100, 0),
            (12_000, 0, 2, 700, 100, 0),
            (12_000, 300, 2, 120, 100, 0),
            (12_000, 150, 6, 40, 100, 1),
        ],
    ),
    _session(
        2,
        OFTEN,
        [
            (0, 0, 2, 0, 100, 0),
            (2_000, 100, 2, 0, 100, 0),
            (2_000, 300, 2, 0, 100, 0),
            (2_000, 600, 2, 0, 100, 0),
            (2_000, 500, 1, 0, 100, 0),
            (2_000, 300, 6, 0, 100, 0),
            (12_000, 0, 2, 0, 100, 0),
            (12_000, 500, 2, 0, 400, 0),
            (12_000, 0, 2, 150, 100, 0),
            (12_000, 150, 2, 100, 100, 0),
            (12_000, 400, 2, 0, 300, 1),
            (12_000, 250, 6, 60, 100, 1),
        ],
    ),
    _session(
        2,
        HEARTBEAT_SECONDS,
        [
            (6_000, 500, 2, 0, 100, 1),
            (6_000, 300, 2, 50, 100, 1),
        ],
    ),
)
QUICK = (
    _session(
        1,
        OFTEN,
        [
            (0, 0, 2, 0, 100, 0),
            (2_000, 0, 2, 0, 100, 0),
            (2_000, 100, 2, 0, 100, 0),
            (2_000, 800, 2, 0, 100, 0),
            (2_000, 500, 1, 0, 300, 0),
            (2_000, 300, 6, 0, 100, 0),
            (2_000, 0, 2, 100, 100, 0),
            (4_000, 400, 2, 50, 100, 1),
        ],
    ),
)
