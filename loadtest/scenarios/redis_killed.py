"""The server loses its Redis in the middle, for good."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import RedisKilled
from loadtest.users import StreamUser

__all__ = ["RedisKilled", "StreamUser"]
