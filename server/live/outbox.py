"""What waits to be written to a reader that has not taken what came before."""

from protocol.frames import Frame


class Outbox:
    """Frames on their way to one reader, bounded in bytes. Nothing here waits.

    Args:
        limit: bytes that may wait.
    """

    __slots__ = ("_frames", "_limit", "_size")

    def __init__(self, *, limit: int) -> None:
        self._frames: list[Frame] = []
        self._size = 0
        self._limit = limit

    def __len__(self) -> int:
        """Bytes that wait."""
        return self._size

    def offer(self, frame: Frame) -> bool:
        """Queue a frame. False: the reader is too slow, and the frame was not taken."""
        size = self._size + len(frame.chunked)
        if size > self._limit:
            return False
        self._frames.append(frame)
        self._size = size
        return True

    def take(self) -> list[Frame]:
        """Everything that waits, in order."""
        frames, self._frames, self._size = self._frames, [], 0
        return frames
