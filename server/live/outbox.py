"""What waits to be written to one stream: bounded in bytes, and in time without progress."""

from collections import deque

import trio

from protocol.frames import Frame, join_plain


class Outbox:
    """Frames on their way to one reader. `offer` is plain, so a publisher never waits.

    Args:
        limit: bytes that may wait.
        stall: seconds that one write may take.
    """

    __slots__ = ("_frames", "_limit", "_size", "_stall", "_wakeup", "_writing_since")

    def __init__(self, *, limit: int, stall: float) -> None:
        self._frames: deque[Frame] | None = None
        self._size = 0
        self._limit = limit
        self._stall = stall
        self._wakeup: trio.Event | None = None
        self._writing_since: float | None = None

    def __len__(self) -> int:
        """Bytes that wait."""
        return self._size

    def offer(self, frame: Frame) -> bool:
        """Queue a frame. False: the reader is too slow, and the frame was not taken."""
        size = self._size + len(frame.plain)
        if size > self._limit or self.stalled:
            return False
        if self._frames is None:
            self._frames = deque()
        self._frames.append(frame)
        self._size = size
        self.wake()
        return True

    @property
    def stalled(self) -> bool:
        """Whether the write under way is over its time."""
        since = self._writing_since
        return since is not None and trio.current_time() - since > self._stall

    def take(self) -> bytes:
        """Everything that waits, as one write."""
        frames, self._frames, self._size = self._frames, None, 0
        if not frames:
            return b""
        return frames[0].plain if len(frames) == 1 else join_plain(frames)

    def clear(self) -> None:
        self._frames, self._size = None, 0

    def wake(self) -> None:
        if self._wakeup is not None:
            self._wakeup.set()

    async def wait(self, deadline: float) -> None:
        """Until something is offered, `wake` is called, or that time, on Trio's clock, is here."""
        if self._frames:
            return
        self._wakeup = trio.Event()
        try:
            with trio.move_on_at(deadline):
                await self._wakeup.wait()
        finally:
            self._wakeup = None

    def write_begins(self) -> None:
        self._writing_since = trio.current_time()

    def write_ended(self) -> None:
        self._writing_since = None
