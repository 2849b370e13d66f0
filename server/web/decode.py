"""Request bodies into structs; what does not fit becomes a problem that repeats nothing."""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from protocol import requests
from server.web.problems import Problem

T = TypeVar("T")

_FIELD = re.compile(r"(?:missing required field `|- at `\$\.)(\w+)`$")
_FIELDS = {
    field.encode_name
    for kind in (requests.SendMessage, *requests.Action.__args__)
    for field in msgspec.structs.fields(kind)
} | {"action"}
"""Only these names are ever said back: a path may hold what the client wrote."""


def decode(decoder: Callable[[bytes], T], raw: bytes) -> T:
    """Decode a body.

    Raises:
        Problem: INVALID_JSON, or INVALID_BODY with the field's name where it is one of ours.
    """
    try:
        return decoder(raw)
    except msgspec.ValidationError as error:
        raise Problem("INVALID_BODY", detail=_explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise Problem("INVALID_JSON") from None


def _explain(text: str) -> str:
    if "unknown field" in text:
        return "The body has a field that is not known here."
    found = _FIELD.search(text)
    if found is None or found[1] not in _FIELDS:
        return "The body must be a JSON object with the documented fields."
    return f"The field `{found[1]}` is missing, or not of its type or range."
