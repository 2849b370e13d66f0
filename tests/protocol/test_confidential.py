"""What carries text, names or tokens shows none of it, wherever it is printed."""

import importlib
import pkgutil
import traceback
from typing import Any

import msgspec
import pytest

import protocol
import storage
from protocol.confidential import Confidential, Secret
from protocol.events import ChatMessage
from storage.contract import Access, Page, Record, User

CANARY = "canary-7f3a"
for package in (protocol, storage):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def every_confidential_type(base: type = Confidential) -> list[type]:
    kinds: list[type] = []
    kind: type
    for kind in base.__subclasses__():
        kinds += [kind, *every_confidential_type(kind)]
    return kinds


def filled_with_canaries(kind: type[msgspec.Struct]) -> Any:
    return kind(**{field.name: CANARY for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", every_confidential_type(), ids=lambda kind: kind.__name__)
def test_nothing_confidential_is_printed(kind: type[msgspec.Struct]):
    value = filled_with_canaries(kind)
    printed = [
        repr(value), str(value), f"{value}", f"{value!r:>40}",
        repr([value]), repr({"x": value}), repr((value,)), repr({value: 1}),
        repr(ValueError(value)), str(ValueError(value)), str(value.__rich_repr__()),
        "".join(traceback.format_exception(ValueError("x", value))),
    ]  # fmt: skip
    assert CANARY not in "".join(printed)
    assert repr(value) == f"<{kind.__name__}>"


def test_the_types_that_carry_people_and_words_are_among_them():
    kinds = {kind.__name__ for kind in every_confidential_type()}
    assert kinds >= {
        "ChatMessage", "Message", "Messages", "Sent", "Channel", "Ticket", "SendMessage",
        "SendMessageAction", "ProblemBody", "User", "Draft", "Record", "Origin", "AuditRow",
    }  # fmt: skip


def test_what_holds_them_prints_nothing_either():
    user, record = filled_with_canaries(User), filled_with_canaries(Record)
    assert CANARY not in repr(Access(user, None)) + str(Page([record], 1))


def test_they_cannot_be_changed():
    message = filled_with_canaries(ChatMessage)
    with pytest.raises(AttributeError):
        message.text = "other"


def test_a_secret_is_shown_by_reveal_alone():
    secret = Secret(CANARY)
    assert secret.reveal() == CANARY
    assert CANARY not in f"{secret} {secret!r} {[secret]} {ValueError(secret)}"
    with pytest.raises(TypeError):
        vars(secret)  # no __dict__ that a debugger's dump would print


def test_secrets_compare_by_what_they_hide():
    assert Secret("a") == Secret("a") != Secret("b")
    assert hash(Secret("a")) == hash(Secret("a"))
    assert Secret("a") != "a"
    assert Secret("a") and not Secret("")
