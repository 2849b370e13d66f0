"""The description of the whole surface is whole: its references lead somewhere, and every route,
struct and problem is in it."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from protocol import events, replies, requests
from protocol.closing import ClosingReason
from protocol.problems import PROBLEMS
from server import routes
from server.handlers.openapi import document

DOCUMENT: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document()))
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (path, method): operation
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
    }


def test_it_is_openapi_3_1_with_what_that_needs():
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["title"]
    assert DOCUMENT["info"]["version"]
    for operation in operations().values():
        assert operation["summary"]
        for response in operation["responses"].values():
            assert response["description"]
        for parameter in operation.get("parameters", ()):
            assert parameter.keys() >= {"name", "in", "schema"}
            assert parameter["in"] in ("path", "query", "header", "cookie")
            assert parameter["required"] is True or parameter["in"] != "path"


def test_every_reference_leads_somewhere():
    references = {value["$ref"] for value in walk(DOCUMENT) if "$ref" in value}
    references |= {
        target
        for value in walk(DOCUMENT)
        if isinstance(mapping := value.get("mapping"), dict)
        for target in mapping.values()
    }
    assert len(references) > 15
    for reference in references:
        prefix, _, name = reference.rpartition("/")
        assert prefix == "#/components/schemas"
        assert name in SCHEMAS, reference


def test_every_schema_is_used():
    used = {value["$ref"].rpartition("/")[2] for value in walk(DOCUMENT) if "$ref" in value}
    assert set(SCHEMAS) == used


def test_every_route_is_described_and_nothing_else():
    described = set(operations())
    served = {(route.path, route.method.lower()) for route in routes.ROUTES}
    assert described == served


def test_every_path_parameter_is_declared():
    for (path, _), operation in operations().items():
        declared = {
            parameter["name"]
            for parameter in operation.get("parameters", ())
            if parameter["in"] == "path"
        }
        assert declared == {part[1:-1] for part in path.split("/") if part.startswith("{")}


def structs(module: Any) -> list[type[msgspec.Struct]]:
    return [
        kind
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    ]


@pytest.mark.parametrize(
    "kind",
    [*structs(requests), *structs(replies), *structs(events)],
    ids=lambda kind: kind.__name__,
)
def test_every_struct_of_the_wire_is_in_it_with_its_fields(kind: type[msgspec.Struct]):
    schema = SCHEMAS[kind.__name__]
    fields = {field.encode_name for field in msgspec.structs.fields(kind)}
    assert fields <= schema["properties"].keys()
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    assert required <= set(schema.get("required", ()))
    if kind in structs(requests):
        assert schema["additionalProperties"] is False


def test_every_action_is_told_apart_by_its_name():
    body = operations()["/api/chat/messaging", "post"]["requestBody"]["content"]
    mapping = body["application/json"]["schema"]["discriminator"]["mapping"]
    assert mapping.keys() == {
        "create_channel",
        "send_message",
        "get_messages",
        "list_channels",
        "mark_read",
    }


def test_every_problem_and_closing_reason_is_named():
    text = msgspec.json.encode(DOCUMENT).decode()
    for code in PROBLEMS.keys() - {"INTERNAL", "METHOD_NOT_ALLOWED"}:
        assert f"`{code}`" in text, code
    for reason in ClosingReason:
        assert f"`{reason.value}`" in text


def test_chat_needs_a_session_and_the_rest_none():
    for (path, _), operation in operations().items():
        needs = {name for way in operation.get("security", ()) for name in way}
        if path == "/api/chat/{channelId}":
            assert needs == {"bearer", "session", "ticket"}
        elif path.startswith("/api/chat/"):
            assert needs == {"bearer", "session"}
        else:
            assert not needs
        assert needs <= DOCUMENT["components"]["securitySchemes"].keys()
