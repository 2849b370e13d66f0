"""`/healthz`, `/readyz` and `/metrics`: for whoever runs the server."""

import os
from typing import Literal

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from protocol.replies import timestamp
from server.service import Service
from server.version import VERSION
from server.web.request import Request
from server.web.response import Response, json_response
from storage.metric_files import FOLDER


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"
    version: str = VERSION


class Readiness(msgspec.Struct, frozen=True):
    """`degraded`: everything works, some of it by a longer way. `unready`: send traffic to
    another process."""

    status: Literal["ready", "degraded", "unready"]
    enabled: bool
    draining: bool
    redis: Literal["up", "down"]
    postgres: Literal["up", "down"]
    keys: Literal["known", "unknown"]
    """Of the issuer: without them nobody can be let in. Once known they stay so."""
    database: list[str]
    """Why a request could not succeed in it, a sentence each: it cannot be reached, is not
    migrated, lacks a column or a right. Empty: it could."""
    since: str | None = None
    """While Redis or PostgreSQL is down: when the first of them went, ISO 8601."""


async def healthz(service: Service, request: Request) -> Response:  # noqa: ARG001
    return json_response(Health())


async def readyz(service: Service, request: Request) -> Response:  # noqa: ARG001
    redis, postgres = service.store.redis.up, service.store.postgres.up
    serves = not service.unready and not service.draining
    status: Literal["ready", "degraded", "unready"] = (
        "unready" if not serves else "ready" if redis else "degraded"
    )
    down = [each.since for each in (service.store.redis, service.store.postgres) if not each.up]
    readiness = Readiness(
        status=status,
        enabled=service.enabled,
        draining=service.draining,
        redis="up" if redis else "down",
        postgres="up" if postgres else "down",
        keys="known" if service.keys.known else "unknown",
        database=list(service.store.unready),
        since=timestamp(round(min(down) * 1000)) if down else None,
    )
    return json_response(readiness, status=200 if serves else 503)


async def metrics(service: Service, request: Request) -> Response:  # noqa: ARG001
    """Of all workers together, where there are several."""
    registry = REGISTRY
    if FOLDER in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return Response(200, generate_latest(registry), content_type=CONTENT_TYPE_LATEST.encode())
