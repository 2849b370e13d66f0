"""What a Redis that answers does not let us do, told by what it says.

An error's text is the server's: no more of it is kept than the name of a command or of a limit.
"""

import re
from typing import NamedTuple

from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

_COMMAND = re.compile(r"'([A-Za-z][A-Za-z|_-]{1,30})'")
_QUOTA = re.compile(r"\b(max [a-z ]{1,40}|DB capacity quota) exceeded")
_IN_SCRIPT = ("ACL failure in script", "The user executing the script")
"""How Valkey and Redis 7 begin what is NOPERM outside of a script."""


class Refusal(NamedTuple):
    what: str
    """What is refused: `login`, `command`, `key`, `channel`, `unknown command`, `database`,
    `memory` (it is full), `write` (it is a replica) or `quota`."""
    name: str = ""
    """The command in lower case, or the quota, where the server names it."""

    @property
    def lasting(self) -> bool:
        """Whether only somebody's hand ends it, so that there is no use in asking often."""
        return self.what not in ("memory", "write", "quota")

    def __str__(self) -> str:
        return f"{self.what} {self.name}".rstrip()


def describe_refusal(refusal: Refusal | None) -> dict[str, str]:
    """A field for a log line; none where nothing was refused."""
    return {} if refusal is None else {"refused": str(refusal)}


def refusal_of(error: BaseException) -> Refusal | None:
    """What was refused; None where nothing was: it is unreachable, slow, starting or moving."""
    text = str(error)
    match error:
        case AuthenticationError():
            return Refusal("login")
        case OutOfMemoryError():
            return Refusal("memory")
        case ReadOnlyError():
            return Refusal("write")
        case ResponseError():
            pass
        case _:
            return None
    if isinstance(error, NoPermissionError) or text.startswith(_IN_SCRIPT):
        found = _COMMAND.search(text)
        if "channel" in text:
            return Refusal("channel")
        if "key" in text:
            return Refusal("key")
        return Refusal("command", found[1].lower() if found else "")
    if text.startswith("unknown command"):
        found = _COMMAND.search(text)
        return Refusal("unknown command", found[1].lower() if found else "")
    if "DB index" in text:
        return Refusal("database")
    if quota := _QUOTA.search(text):
        return Refusal("quota", quota[1])
    return None
