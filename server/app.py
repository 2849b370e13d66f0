"""The ASGI application: from a scope to a handler, and from whatever happens to a response.

`server.app:app` runs on our worker and on stock `hypercorn --worker-class trio`. It opens its
parts in the lifespan; requests may come as soon as that has started.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
import trio

from protocol.closing import PASSING, ClosingReason
from protocol.problems import ProblemBody
from server import routes
from server.auth.jwks import KeySource, PemKey, RemoteKeys, jwks_url
from server.metrics import REQUEST_SECONDS
from server.service import Service, open_service
from server.settings import Settings, SettingsError, load_settings
from server.web.cors import cors_headers, preflight
from server.web.problems import Problem, closing_response, problem_response
from server.web.request import PeerLeft, Request
from server.web.response import Life, Send
from storage.contract import StoreUnavailable
from storage.failures import describe

log = structlog.get_logger("server")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]

AUDITED = (401, 403, 404, 429)
"""Refusals that the audit trail has; a request that is only malformed is none."""


class Application:
    """One per worker.

    Args:
        environ: where the settings are read from when the lifespan starts.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._settings: Settings | None = None
        """Once they are read; they outlive the service."""
        self._service: Service | None = None
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                self._in_flight += 1
                try:
                    life = await self._serve_request(scope, receive, send)
                    del scope, receive, send  # a stream may live for hours
                    if life is not None:
                        await life()
                except Abandoned:
                    raise
                except Exception as error:
                    log.error("stream_failed", **describe(error))
                    raise Abandoned from None
                finally:
                    self._in_flight -= 1
            case "lifespan":
                await self._serve_lifespan(receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})

    async def answer_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request of a connection that the server has no room for."""
        await self._serve_request(scope, receive, send, full=True)

    @property
    def unready(self) -> list[str]:
        """Why no request could succeed now, a sentence each, free of secrets; empty: it could."""
        return (
            ["the application has not started"] if self._service is None else self._service.unready
        )

    async def drain(self, *, refuse: bool) -> None:
        """End all streams over the settings' drain time, and let requests finish. Bounded;
        returns when there is nothing left or no time.

        Args:
            refuse: new streams get 503 from now on.
        """
        if self._service is not None:
            seconds = self._service.settings.drain_seconds
            await self._service.drain(lambda: self._in_flight, refuse=refuse, seconds=seconds)

    def set_enabled(self, enabled: bool) -> None:
        """Turn the chat on or off. Plain."""
        if self._service is not None:
            self._service.set_enabled(enabled)

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            settings = load_settings(self._environ)
        except SettingsError as error:
            await send({"type": "lifespan.startup.failed", "message": "\n".join(error.findings)})
            return
        self._settings = settings
        keys: KeySource = (
            PemKey(settings.clerk_jwt_key)
            if settings.clerk_jwt_key
            else RemoteKeys(jwks_url(settings.issuer))
        )
        async with trio.open_nursery() as services:
            self._service = await services.start(_hold, settings, keys)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keys.prefetch)
                    nursery.start_soon(self._follow_epochs, services, settings, keys)
                    await send({"type": "lifespan.startup.complete"})
                    await receive()
                    nursery.cancel_scope.cancel()
            finally:
                self._service.done.set()
                self._service = None
        await send({"type": "lifespan.shutdown.complete"})

    async def _follow_epochs(
        self, services: trio.Nursery, settings: Settings, keys: KeySource
    ) -> None:
        """Give each epoch a service of its own, so that nothing which was believed in one is in the
        next: no head, no page, no permit, no connection to Redis. The issuer's keys are of none."""
        while True:
            old = self._service
            assert old is not None
            await old.store.over.wait()
            new: Service = await services.start(_hold, settings, keys)
            new.enabled, new.draining = old.enabled, old.draining
            self._service = new
            try:
                # At once: what they show is over. Their clients come back spread by `retry`.
                await old.drain(lambda: self._in_flight, refuse=True, seconds=0)
            finally:
                old.done.set()

    async def _serve_request(
        self, scope: Scope, receive: Receive, send: Send, *, full: bool = False
    ) -> Life | None:
        """Answer; for a stream, begin to."""
        started = trio.current_time()
        status = 0  # until the response has started
        closing: ClosingReason | None = None

        async def watched(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        found = routes.find(scope["path"])
        route, path_id = found or (None, None)
        request = Request(scope, receive, path_id=path_id)
        extra = [(b"x-request-id", request.id.encode())]
        service, settings = self._service, self._settings
        if settings is not None and scope["path"].startswith(routes.CHAT_PREFIX):
            extra += cors_headers(request, settings.allowed_origins)
        try:
            if full:
                raise Problem("SERVER_FULL", retry_after=5)
            if service is None:
                raise Problem("DRAINING", retry_after=1)
            life = await self._answer(service, route, request, watched, extra)
            if life is not None:
                status = 200
            return life
        except PeerLeft:
            pass
        except Exception as error:
            problem = _problem_of(error)
            if problem is None:
                log.error("request_failed", request_id=request.id, **describe(error))
                problem = Problem("INTERNAL")
            if status:  # too late for an answer: break the response off
                raise Abandoned from None
            if service is not None:
                self._note_refusal(service, route, request, problem)
            linger = request.discard if request.unread else None
            closing = _closing_of(problem, route, request)
            if closing is not None:
                retry = settings.retry_milliseconds if settings is not None else 0
                await closing_response(problem, closing, retry=retry)(watched, extra, linger=linger)
                status = problem.status  # to us it is no stream
            else:
                body = self._body_of(problem, service, route)
                await problem_response(problem, body)(watched, extra, linger=linger)
        finally:
            if route is not routes.STREAM or status != 200:
                seconds = trio.current_time() - started
                self._log(route, request, status, seconds, closing=closing)
        return None

    async def _answer(
        self,
        service: Service,
        route: routes.Route | None,
        request: Request,
        send: Send,
        extra: list[tuple[bytes, bytes]],
    ) -> Life | None:
        if request.framed_twice:
            # What follows on this connection may be a part of the body to a proxy before us.
            raise Problem(
                "INVALID_BODY",
                detail="A body has a length or comes in chunks, not both.",
                headers=[(b"connection", b"close")],
            )
        if route is None:
            raise Problem("NOT_FOUND")
        if route.path.startswith(routes.CHAT_PREFIX) and not service.enabled:
            raise Problem("NOT_FOUND", detail="The chat is turned off.")
        methods = ["OPTIONS", route.method]
        if route.method == "GET" and route is not routes.STREAM:
            methods.append("HEAD")
        if request.method == "OPTIONS":
            allowed = service.settings.allowed_headers
            await preflight(methods, extra, allowed_headers=allowed)(send)
            return None
        if request.method not in methods:
            allow = ", ".join(methods).encode()
            raise Problem("METHOD_NOT_ALLOWED", headers=[(b"allow", allow)])
        answer = await route.handler(service, request)
        return await answer(send, extra)

    def _note_refusal(
        self, service: Service, route: routes.Route | None, request: Request, problem: Problem
    ) -> None:
        chat = route is not None and route.path.startswith(routes.CHAT_PREFIX)
        if chat and service.enabled and problem.status in AUDITED:
            assert route is not None
            request.channel_id = request.channel_id or request.path_id
            service.note(request, route.name, outcome="refused", detail=problem.code)

    def _body_of(
        self, problem: Problem, service: Service | None, route: routes.Route | None
    ) -> ProblemBody | None:
        """With the chat turned off, `availability` says so in its 404."""
        if service is None or service.enabled or route is None or route.name != "availability":
            return None
        return problem.body(enabled=False)

    def _log(
        self,
        route: routes.Route | None,
        request: Request,
        status: int,
        seconds: float,
        *,
        closing: ClosingReason | None,
    ) -> None:
        """One line of the log, and the metric.

        Args:
            closing: the reason that an `EventSource` was told with a 200, in place of `status`.
        """
        name = route.name if route else "unknown"
        REQUEST_SECONDS.labels(name, str(status)).observe(seconds)
        quiet = name in ("healthz", "readyz", "metrics")
        (log.debug if quiet else log.info)(
            "request",
            route=name,
            method=request.method if request.method in _METHODS else "other",
            status=status,
            ms=round(seconds * 1000, 2),
            request_id=request.id,
            user_id=request.user_id,
            channel_id=request.channel_id,
            **({} if request.seq is None else {"seq": request.seq}),
            **({} if closing is None else {"closing": closing.value}),
        )


async def _hold(
    settings: Settings, keys: KeySource, *, task_status: trio.TaskStatus[Service]
) -> None:
    """A service until it is done with."""
    async with open_service(settings, keys) as service:
        task_status.started(service)
        await service.done.wait()


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Abandoned(Exception):
    """A response that had begun was broken off; what for is in the log."""


def _problem_of(error: Exception) -> Problem | None:
    """The one place where an exception becomes a status; None for a defect of ours."""
    match error:
        case Problem():
            return error
        case StoreUnavailable():
            return Problem("UNAVAILABLE", retry_after=error.retry_after)
        case _:
            return None


def _closing_of(
    problem: Problem, route: routes.Route | None, request: Request
) -> ClosingReason | None:
    """The reason that a stream closes with in place of a problem; None where the client gets the
    problem and its status."""
    if route is routes.STREAM and request.method == "GET" and request.asks_for_events:
        return PASSING.get(problem.code)
    return None


app = Application(os.environ)
