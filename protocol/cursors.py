"""Cursors: the `id:` of an event, which a client hands back to resume after it.

`17` is sequence number 17 of the channel's first epoch. `1795430000.17` is number 17 of the epoch
that began then, in seconds since 1970: the database had been restored to an earlier point, and
numbers were used again.
"""

import re
from typing import NamedTuple

MAX_SEQ = 2**63 - 1

_CURSOR = re.compile(rb"(?:([0-9]{1,10})\.)?([0-9]{1,19})", re.ASCII)


class CursorError(ValueError):
    """The text is no cursor. It carries nothing of the text."""


class Cursor(NamedTuple):
    epoch: int
    seq: int

    def encode(self) -> bytes:
        return encode_cursor(self.epoch, self.seq)


def encode_cursor(epoch: int, seq: int) -> bytes:
    """The bytes of an `id:` line: plain decimal in epoch 0, `<epoch>.<seq>` after it."""
    return b"%d" % seq if epoch == 0 else b"%d.%d" % (epoch, seq)


def parse_cursor(raw: bytes) -> Cursor | None:
    """Read a `Last-Event-ID`.

    Args:
        raw: the header's or the query parameter's bytes.

    Returns:
        None for an empty one, which is what a client sends that has no last event
        (WHATWG HTML §9.2.4: an empty `id:` forgets it).

    Raises:
        CursorError: anything but ASCII digits with at most one epoch, or out of range.
    """
    raw = raw.strip()
    if not raw:
        return None
    match = _CURSOR.fullmatch(raw)
    if match is None:
        raise CursorError
    seq = int(match[2])
    if seq > MAX_SEQ:
        raise CursorError
    return Cursor(int(match[1] or 0), seq)
