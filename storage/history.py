"""The proof that messages from Redis are all that there are. Pure."""

from collections.abc import Sequence

from storage.contract import Page, Record


def prove(records: Sequence[Record], *, after: int | None, head: int, size: int) -> Page | None:
    """What a reader needs of `records`, if they prove to be complete for it.

    Args:
        records: strictly rising by seq; whatever Redis had.
        after: the reader's cursor; None for the newest `size`.
        head: a number that the channel is known to have reached.

    Returns:
        None unless the records are contiguous, reach `head`, and begin at or before the first
        one that the reader is owed.
    """
    if not records:
        return None
    first, last = records[0].seq, records[-1].seq
    if last - first + 1 != len(records) or last < head:
        return None
    if after is None:
        if first > 1 and len(records) < size:
            return None
        return Page(list(records[-size:]), last)
    if not first - 1 <= after <= last:
        return None
    return Page(list(records[after - first + 1 :]), last)
