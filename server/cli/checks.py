"""What the doctor's examinations have in common: a check, its time, and how its result is said."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx
import msgspec
import trio
import typer

from protocol.parser import EventStreamParser, ServerSentEvent

CHECK_SECONDS = 5.0
CLIENT_SECONDS = 4  # one connection or command: less, so that a client can say what hung
ONCE_SECONDS = 0.5  # in which a message that came would come a second time


class Fault(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, finding: str, remedy: str) -> None:
        super().__init__(finding)
        self.finding = finding
        self.remedy = remedy


class Check(NamedTuple):
    name: str
    look: Callable[[], Awaitable[str]]
    needs: str | None = None
    """The check without which this one has no sense."""
    seconds: float = CHECK_SECONDS
    """At most so long, whatever hangs."""


async def examine(checks: Iterable[Check]) -> bool:
    """Print a line for each check; whether all is well."""
    failed: set[str] = set()
    for check in checks:
        try:
            if check.needs in failed:
                raise Fault(f"not looked at: {check.needs} comes first", "as above")
            finding = await _bounded(check)
        except Fault as fault:
            failed.add(check.name)
            typer.echo(f"FAIL {check.name} — {fault.finding}")
            typer.echo(f"     remedy: {fault.remedy}")
        else:
            typer.echo(f"ok   {check.name} — {finding}")
    return not failed


async def _bounded(check: Check) -> str:
    """The check, in its time; whatever else it raises is a fault too.

    Raises:
        Fault
    """
    try:
        with trio.fail_after(check.seconds):
            return await check.look()
    except trio.TooSlowError:
        error: BaseException = Fault(
            f"nothing within {check.seconds:g} s", "what hangs here hangs for everybody"
        )
    except Exception as failure:
        error = failure
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Fault):
        raise error
    if isinstance(error, httpx.HTTPError):
        raise Fault(f"no answer ({type(error).__name__})", "see the line on the server") from None
    raise Fault(f"it failed ({type(error).__name__})", "the lines above, or report it") from None


def client_of(base_url: str, *, token: str = "") -> httpx.AsyncClient:
    """A client of the server, as the token's person. The environment's proxies are for others: a
    plain URL names a machine at hand."""
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=CLIENT_SECONDS,
        trust_env=base_url.startswith("https:"),
    )


class Stream:
    """An open stream, and what came on it.

    Attributes:
        headers: of the response.
        connected: seconds until its first event.
        ids: of the messages that came, the messages' own.
        last_event_id: the cursor to resume after.
        heartbeat: set at the first one.
    """

    def __init__(self) -> None:
        self.headers = httpx.Headers()
        self.connected = 0.0
        self.ids: list[str] = []
        self.last_event_id = ""
        self.heartbeat = trio.Event()


@asynccontextmanager
async def open_stream(
    client: httpx.AsyncClient, channel_id: int, *, headers: dict[str, str] | None = None
) -> AsyncIterator[Stream]:
    """A stream, from its `connected` on.

    Raises:
        Fault: it is refused, or ends.
    """
    stream = Stream()
    async with trio.open_nursery() as nursery:
        await nursery.start(_listen, client, f"/api/chat/{channel_id}", stream, headers)
        yield stream
        nursery.cancel_scope.cancel()


async def _listen(
    client: httpx.AsyncClient,
    path: str,
    stream: Stream,
    headers: dict[str, str] | None,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    parser = EventStreamParser()
    began = trio.current_time()
    timeout = httpx.Timeout(CLIENT_SECONDS, read=None)  # a check has its own limit
    async with client.stream("GET", path, headers=headers, timeout=timeout) as response:
        stream.headers = response.headers
        if response.status_code != 200:
            await response.aread()
            raise Fault(
                f"it got {response.status_code} {code_of(response)}",
                remedy_for(response.status_code),
            )
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise Fault("what answers is no event stream", "route /api/chat/ to sottovoce")
        if "content-encoding" in response.headers:
            raise Fault(
                "a proxy compresses it, and so holds events back",
                "no compression of text/event-stream: see docs/tuning.md",
            )
        async for part in response.aiter_raw():
            for event in parser.feed(part):
                kind, message_id = _read_event(event)
                stream.last_event_id = parser.last_event_id
                if kind == "connected" and not stream.connected:
                    stream.connected = trio.current_time() - began
                    task_status.started()
                elif event.event == "heartbeat":
                    stream.heartbeat.set()
                elif event.event == "closing":
                    raise Fault(f"the server ends it ({reason_of(event)})", "see the server's log")
                elif message_id:
                    stream.ids.append(message_id)
    raise Fault("it was ended", "look at the log of the server, and of the proxy before it")


def remedy_for(status: int) -> str:
    match status:
        case 401:
            return "the server has other settings than this environment: token, issuer, parties"
        case 403:
            return "the token must be of the therapist of --channel"
        case 404:
            return "turn the chat on (see flag), or make the token's user known to the database"
        case 503:
            return "see postgres and ready"
        case _:
            return "the server's log has this request"


def code_of(answer: httpx.Response) -> str:
    """A problem's code, where it is one."""
    try:
        code = answer.json()["code"]
    except (ValueError, KeyError, TypeError):
        return ""
    return code if isinstance(code, str) and code.isascii() and len(code) < 40 else ""


def reason_of(event: ServerSentEvent) -> str:
    """Returns the reason that a `closing` event gives, as a line may show it."""
    try:
        reason = str(msgspec.json.decode(event.data)["reason"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "without a reason"
    return reason if reason.isascii() and len(reason) < 40 else "unknown"


def _read_event(event: ServerSentEvent) -> tuple[str, str]:
    """(`type`, `id`) of an unnamed event's JSON, each empty where it has none."""
    if event.event != "message":
        return "", ""
    try:
        data = msgspec.json.decode(event.data)
        return str(data.get("type", "")), str(data.get("id", ""))
    except (msgspec.DecodeError, AttributeError):
        return "", ""
