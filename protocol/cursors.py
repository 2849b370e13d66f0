"""Cursors: the `id:` of an event, which a client hands back to resume after it.

`17` is sequence number 17 of the channel's first epoch. `1795430000.17` is number 17 of the epoch
that began then, in seconds since 1970: the database had been restored to an earlier point, and
numbers were used again.
"""

import re
from typing import NamedTuple

MAX_SEQ = 2**63 - 1

MAX_FOREIGN_BYTES = 256
"""The longest id that may be another server's. UUIDs have 36 characters, and the ids of servers of
other kinds that we know (Redis streams, Mercure's URNs) have well under 100."""

_CURSOR = re.compile(rb"(?:([0-9]{1,10})\.)?([0-9]{1,19})", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class CursorError(ValueError):
    """The text is nobody's event id. It carries nothing of the text."""


class Cursor(NamedTuple):
    epoch: int
    seq: int

    def encode(self) -> bytes:
        return encode_cursor(self.epoch, self.seq)


FOREIGN = Cursor(-1, 0)
"""Another server's event id, so of no epoch of ours. An `EventSource` hands back whatever the last
server behind its URL gave it."""


def encode_cursor(epoch: int, seq: int) -> bytes:
    """The bytes of an `id:` line: plain decimal in epoch 0, `<epoch>.<seq>` after it."""
    return b"%d" % seq if epoch == 0 else b"%d.%d" % (epoch, seq)


def parse_cursor(raw: bytes) -> Cursor | None:
    """Read a `Last-Event-ID`.

    Args:
        raw: the header's or the query parameter's bytes.

    Returns:
        None for an empty one, which is what a client sends that has no last event
        (WHATWG HTML §9.2.4: an empty `id:` forgets it). `FOREIGN` for what is not of our form, but
        readable: a refusal would end its `EventSource` for good, and a reset mends it.

    Raises:
        CursorError: no UTF-8, a control character, or longer than `MAX_FOREIGN_BYTES`. No server
            gives such ids, so that this is no `EventSource` which asks, and nothing is lost.
    """
    raw = raw.strip()
    if not raw:
        return None
    match = _CURSOR.fullmatch(raw)
    if match is not None and (seq := int(match[2])) <= MAX_SEQ:
        return Cursor(int(match[1] or 0), seq)
    if len(raw) > MAX_FOREIGN_BYTES:
        raise CursorError
    try:
        readable = _CONTROL.search(raw.decode()) is None
    except UnicodeDecodeError:
        readable = False
    if not readable:
        raise CursorError
    return FOREIGN
