"""The base of every type that carries text, names or tokens: its repr shows none of it."""

import msgspec


class Confidential(msgspec.Struct, frozen=True):
    """A struct whose repr is its type alone, so that no log line or traceback can print it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


class Secret:
    """A string that is shown by `reveal` and by nothing else (settings, keys, passwords)."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "<Secret>"

    __str__ = __repr__
