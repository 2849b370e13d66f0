"""More and more streams, until an objective breaks."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Steps
from loadtest.users import StreamUser

__all__ = ["Steps", "StreamUser"]
