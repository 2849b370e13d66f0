"""People who write to each other."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import Hold
from loadtest.users import ChatUser, Therapist

__all__ = ["ChatUser", "Hold", "Therapist"]
