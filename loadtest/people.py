"""Who takes part: the pairs that `sottovoce seed` wrote, as seats that users take."""

import secrets
from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec


class Pair(msgspec.Struct, frozen=True):
    """A line of `sottovoce seed`."""

    channel_id: int
    therapist_token: str
    prospect_token: str

    def __repr__(self) -> str:
        return f"<Pair {self.channel_id}>"


class Seat(NamedTuple):
    """Somebody at a channel.

    Attributes:
        mark: eight hexadecimal digits at the end of the client message ids of whoever sits here,
            by which they know their own messages.
    """

    channel_id: int
    token: str
    mark: str

    @classmethod
    def at(cls, channel_id: int, token: str) -> "Seat":
        return cls(channel_id, token, secrets.token_hex(4))

    def new_message_id(self) -> str:
        """A client message id: unique, and ours."""
        random = secrets.token_hex(12)
        return (
            f"{random[:8]}-{random[8:12]}-{random[12:16]}-{random[16:20]}-{random[20:]}{self.mark}"
        )

    def wrote(self, client_message_id: str) -> bool:
        return client_message_id.endswith(self.mark)

    def __repr__(self) -> str:
        return f"<Seat {self.channel_id}>"


class NoSeat(Exception):
    """There are more users than people."""


def read_pairs(file: Path, *, index: int = 0, of: int = 1) -> list[Pair]:
    """A process' share: both people of a channel are always in the same one, so that it knows
    what each stream is owed, and one clock measures from sending to receiving.

    Args:
        index: of this process, from 0.
        of: processes.

    Raises:
        OSError, msgspec.MsgspecError
    """
    lines = file.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Pair) for line in lines[index::of]]


class Seats:
    """Those that are free. Both of a channel are taken before the next channel's."""

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = deque(pairs)
        self._free: deque[Seat] = deque()

    def take(self) -> Seat:
        """
        Raises:
            NoSeat
        """
        if not self._free:
            pair = self.take_pair()
            self._free.append(Seat.at(pair.channel_id, pair.therapist_token))
            self._free.append(Seat.at(pair.channel_id, pair.prospect_token))
        return self._free.popleft()

    def take_pair(self) -> Pair:
        """Both at once.

        Raises:
            NoSeat
        """
        if not self._pairs:
            raise NoSeat("more users than people: seed more channels")
        return self._pairs.popleft()

    def give_back(self, seat: Seat) -> None:
        """Or offer a new one; it is taken before any other."""
        self._free.appendleft(seat)
