"""`GET /openapi.json`: OpenAPI 3.1, made from the structs that decode the requests and encode the
replies, and from the tables of problems and closing reasons."""

from importlib.metadata import version
from typing import Any

import msgspec

from protocol import events, replies, requests
from protocol.closing import CLOSING_RULES
from protocol.problems import PROBLEMS, ProblemBody
from server.handlers.health import Health, Readiness
from server.service import Service
from server.web.request import Request
from server.web.response import Response, json_response

ACTION_REPLIES = (
    replies.ChannelCreated,
    replies.ChannelExists,
    replies.Sent,
    replies.Messages,
    replies.Channels,
    replies.Done,
)
_TYPES: tuple[Any, ...] = (
    requests.SendMessage,
    *requests.Action.__args__,
    *ACTION_REPLIES,
    replies.Availability,
    replies.Ticket,
    events.Connected,
    events.ChatMessage,
    events.Closing,
    events.Reset,
    ProblemBody,
    Health,
    Readiness,
)


async def openapi(service: Service, request: Request) -> Response:  # noqa: ARG001
    return json_response(document())


def document() -> dict[str, Any]:
    """The description of the whole surface."""
    _, components = msgspec.json.schema_components(
        _TYPES, ref_template="#/components/schemas/{name}"
    )
    secured: list[dict[str, list[str]]] = [{"bearer": []}, {"session": []}]
    channel_id = {"type": "integer", "minimum": 1}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sottovoce",
            "version": version("sottovoce"),
            "summary": "Confidential one-to-one chat over Server-Sent Events",
        },
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "Clerk session JWT"},
                "session": {"type": "apiKey", "in": "cookie", "name": "__session"},
                "ticket": {"type": "apiKey", "in": "query", "name": "ticket"},
            },
        },
        "paths": {
            "/api/chat/{channelId}": {
                "get": {
                    "summary": "A channel's messages as they come",
                    "description": _stream_description(),
                    "security": [*secured, {"ticket": []}],
                    "parameters": [
                        _parameter("channelId", "path", channel_id, required=True),
                        _parameter("Last-Event-ID", "header", {"type": "string"}),
                        _parameter("lastEventId", "query", {"type": "string"}),
                    ],
                    "responses": {
                        "200": {
                            "description": "The stream; or, where it was asked for by name and "
                            "waiting may help, a `closing` in place of a problem",
                            "content": {
                                "text/event-stream": {
                                    "schema": {
                                        "anyOf": [
                                            _ref(events.Connected),
                                            _ref(events.ChatMessage),
                                            _ref(events.Closing),
                                            _ref(events.Reset),
                                        ]
                                    }
                                }
                            },
                        },
                        **_problems(400, 401, 403, 404, 429, 503),
                    },
                }
            },
            "/api/chat/send": {
                "post": {
                    "summary": "Send a message",
                    "security": secured,
                    "parameters": [
                        _parameter(
                            "Idempotency-Key", "header", {"type": "string", "format": "uuid"}
                        )
                    ],
                    "requestBody": _body(_ref(requests.SendMessage)),
                    "responses": {"200": _json("Stored", _ref(replies.Sent)), **_post_problems()},
                }
            },
            "/api/chat/messaging": {
                "post": {
                    "summary": "Channels and messages, by `action`",
                    "security": secured,
                    "requestBody": _body(
                        {
                            "oneOf": [_ref(kind) for kind in requests.Action.__args__],
                            "discriminator": {
                                "propertyName": "action",
                                "mapping": {
                                    kind.__struct_config__.tag: _ref(kind)["$ref"]
                                    for kind in requests.Action.__args__
                                },
                            },
                        }
                    ),
                    "responses": {
                        "200": _json("Done", {"anyOf": [_ref(kind) for kind in ACTION_REPLIES]}),
                        **_post_problems(),
                    },
                }
            },
            "/api/chat/export": {
                "get": {
                    "summary": "The conversation as a text file, for its therapist",
                    "security": secured,
                    "parameters": [_parameter("channelId", "query", channel_id, required=True)],
                    "responses": {
                        "200": {
                            "description": "The transcript",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        },
                        **_problems(400, 401, 403, 404, 503),
                    },
                }
            },
            "/api/chat/availability": {
                "get": {
                    "summary": "What a page needs to show or hide the chat",
                    "security": secured,
                    "responses": {
                        "200": _json("Available", _ref(replies.Availability)),
                        **_problems(401, 403, 404, 503),
                    },
                }
            },
            "/api/chat/ticket": {
                "post": {
                    "summary": "A credential for the streams of one cross-origin EventSource",
                    "security": secured,
                    "responses": {
                        "200": _json("A ticket", _ref(replies.Ticket)),
                        **_problems(401, 403, 404, 503),
                    },
                }
            },
            "/healthz": {
                "get": {
                    "summary": "The process lives",
                    "responses": {"200": _json("Alive", _ref(Health))},
                }
            },
            "/readyz": {
                "get": {
                    "summary": "It can serve, and what is degraded",
                    "responses": {
                        "200": _json("Ready or degraded", _ref(Readiness)),
                        "503": _json("Not ready", _ref(Readiness)),
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This document",
                    "responses": {"200": _json("OpenAPI 3.1", {"type": "object"})},
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Prometheus metrics",
                    "responses": {"200": {"description": "Metrics", "content": {"text/plain": {}}}},
                }
            },
        },
    }


def _stream_description() -> str:
    reasons = "\n".join(
        f"- `{reason}`: {rule.meaning}" + ("" if rule.reconnect else " (do not reconnect)")
        for reason, rule in CLOSING_RULES.items()
    )
    return (
        "Unnamed events are `Connected` (first) and `ChatMessage`, whose `id:` is the channel's "
        "sequence number. Named events: `heartbeat`, `reset` (the cursor was not of this "
        "channel's past), `closing`. Asked for with `Accept: text/event-stream`, a refusal that "
        "waiting may mend is a 200 with `retry:`, `closing` and the end; else it is the problem. "
        "Reasons of `closing`:\n" + reasons
    )


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _parameter(
    name: str, where: str, schema: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": schema}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _post_problems() -> dict[str, Any]:
    return _problems(400, 401, 403, 404, 408, 409, 413, 414, 415, 429, 431, 501, 503, 505)


def _problems(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {
            "description": ", ".join(
                f"`{code}`" for code, kind in PROBLEMS.items() if kind.status == status
            ),
            "content": {"application/problem+json": {"schema": _ref(ProblemBody)}},
        }
        for status in statuses
    }
