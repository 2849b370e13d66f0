"""A working day of people who write to each other, in the time of the run."""

import loadtest.plugin  # noqa: F401
from loadtest.shapes import WorkingDay
from loadtest.users import ChatUser, Therapist

__all__ = ["ChatUser", "Therapist", "WorkingDay"]
