"""Everybody drops, and is back within three seconds."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Herd
from loadtest.users import StreamUser

__all__ = ["Herd", "StreamUser"]
