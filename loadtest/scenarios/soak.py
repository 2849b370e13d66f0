"""For hours, and every stream is lost now and then."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Hold
from loadtest.users import StreamUser

__all__ = ["Hold", "StreamUser"]
