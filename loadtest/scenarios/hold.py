"""Everybody holds a stream; messages come at a steady pace."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Hold
from loadtest.users import StreamUser

__all__ = ["Hold", "StreamUser"]
