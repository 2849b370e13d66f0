"""Some who hardly read, among many who do."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Hold
from loadtest.users import SlowReader, StreamUser

__all__ = ["Hold", "SlowReader", "StreamUser"]
