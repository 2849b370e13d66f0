"""`sottovoce doctor --from-outside`: what a browser gets, through everything that is in between.

It asks the chat's own endpoints alone, for a proxy hides the operators', and looks at what proxies
break: they buffer and compress streams, cut silent ones, drop headers, rewrite Host. It needs no
setting of the server.
"""

import uuid

import httpx
import trio

from protocol.confidential import Confidential
from server.cli.checks import (
    CHECK_SECONDS,
    ONCE_SECONDS,
    Check,
    Fault,
    client_of,
    code_of,
    open_stream,
    remedy_for,
)

BUFFERED_SECONDS = 2.0
"""A `connected` or a message that takes longer was held back: the rest of the way takes
milliseconds, and a second at the other end of the world."""
SILENT_SECONDS = 65.0
"""How long an idle stream is watched for a heartbeat: beyond the 60 s after which most proxies end
a silent one."""
LONG_HEARTBEAT_SECONDS = 29.0
"""Next.js' rewrites end a response that was silent for 30 s."""
OPERATORS = {"/metrics": "sottovoce_", "/readyz": '"postgres"', "/healthz": '"version"'}
"""The endpoints that are to stay inside, and a word of each that is sottovoce's own."""


class View(Confidential, frozen=True, kw_only=True):
    """The server as somebody outside sees it: its address, and whose session is used."""

    base_url: str
    channel_id: int | None
    token: str
    """A therapist's; empty if there is none."""


class Outside:
    """One examination."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._marker = uuid.uuid4()
        self._cursor = ""
        self._sent = ""

    def checks(self) -> tuple[Check, ...]:
        silent = SILENT_SECONDS + CHECK_SECONDS
        return (
            Check("server", self._server),
            Check("inside", self._inside, needs="server"),
            Check("stream", self._stream, needs="server"),
            Check("message", self._message, needs="stream"),
            Check("resume", self._resume, needs="message"),
            Check("cookie", self._cookie, needs="message"),
            Check("export", self._export, needs="message"),
            Check("heartbeat", self._heartbeat, needs="stream", seconds=silent),
        )

    async def _server(self) -> str:
        url = self._view.base_url
        async with self._client() as client:
            try:
                answer = await client.get("/api/chat/availability")
            except httpx.HTTPError as error:
                raise Fault(
                    f"{url} does not answer ({type(error).__name__})",
                    "see to its name, its certificate (SSL_CERT_FILE) and the proxy",
                ) from None
        code = code_of(answer)
        if answer.status_code in (502, 503, 504) and not code:
            raise Fault(
                f"the proxy answers {answer.status_code} by itself", "start the servers behind it"
            )
        if answer.status_code != 200 and not code:
            raise Fault(
                f"something else answers {answer.status_code} at /api/chat/",
                "route /api/chat/ to sottovoce; in Next.js a route of the file system beats a "
                "rewrite",
            )
        if answer.status_code == 404 and code == "NOT_FOUND":
            raise Fault(
                "the chat is turned off", "set NEXT_PUBLIC_ENABLE_CHAT_FEATURE=true (exactly)"
            )
        if answer.status_code == 401 and not self._view.token:
            return f"{url} answers"
        if answer.status_code == 401:
            raise Fault(
                f"it refuses the token ({code})",
                "a fresh one in SOTTOVOCE_TOKEN; if it is fresh, the proxy drops Authorization",
            )
        if answer.status_code != 200:
            raise Fault(f"it got {answer.status_code} {code}", remedy_for(answer.status_code))
        return f"{url} answers"

    async def _inside(self) -> str:
        open_to_all = []
        async with client_of(self._view.base_url) as client:
            for path, word in OPERATORS.items():
                answer = await client.get(path)
                if word in answer.text:
                    open_to_all.append(path)
        if open_to_all:
            raise Fault(
                f"{' and '.join(open_to_all)} can be read by everybody",
                "let the proxy pass /api/chat/ and nothing else of sottovoce's",
            )
        return "the operators' endpoints are not to be seen"

    async def _stream(self) -> str:
        channel_id = self._need_channel()
        async with self._client() as client:
            try:
                with trio.fail_after(CHECK_SECONDS - 0.5):
                    async with open_stream(client, channel_id, headers=_EVENT_SOURCE) as stream:
                        after, headers = stream.connected, stream.headers
            except trio.TooSlowError:
                after, headers = CHECK_SECONDS, httpx.Headers()
        if after > BUFFERED_SECONDS:
            raise Fault(
                f"its first event took {after:.1f} s: a proxy holds it back",
                "turn its buffering off (nginx: proxy_buffering off; Caddy: flush_interval -1)",
            )
        if "no-transform" not in headers.get("cache-control", ""):
            raise Fault(
                "a proxy changes Cache-Control, by which others know not to touch the stream",
                "pass the server's Cache-Control on",
            )
        return f"connected after {after * 1000:.0f} ms, not compressed"

    async def _message(self) -> str:
        channel_id = self._need_channel()
        async with (
            self._client() as client,
            open_stream(client, channel_id, headers=_EVENT_SOURCE) as stream,
        ):
            began = trio.current_time()
            self._sent = await self._send(client, {})
            while self._sent not in stream.ids:  # noqa: ASYNC110 - once in a run
                await trio.sleep(0.01)
            took = trio.current_time() - began
            self._cursor = stream.last_event_id
            await trio.sleep(ONCE_SECONDS)
            times = stream.ids.count(self._sent)
        if times != 1:
            raise Fault("it came more than once", "this is a defect of the server: report it")
        if took > BUFFERED_SECONDS:
            raise Fault(
                f"it was heard after {took:.1f} s: a proxy holds it back", "turn its buffering off"
            )
        return f"sent, and heard once after {took * 1000:.0f} ms"

    async def _resume(self) -> str:
        headers = _EVENT_SOURCE | {"Last-Event-ID": self._cursor}
        async with (
            self._client() as client,
            open_stream(client, self._need_channel(), headers=headers) as stream,
        ):
            await trio.sleep(ONCE_SECONDS)
            again = self._sent in stream.ids
        if again:
            raise Fault(
                "a stream that comes back begins anew: Last-Event-ID does not arrive",
                "let the proxy pass that header on",
            )
        return "a stream that comes back goes on where it was"

    async def _cookie(self) -> str:
        """Repeats the send with the cookie, as a browser does it and as an old one. It is the same
        message, so nothing is stored."""
        url = httpx.URL(self._view.base_url)
        origin = {"Origin": f"{url.scheme}://{url.netloc.decode()}"}
        cookie = {"Cookie": f"__session={self._view.token}"}
        async with client_of(self._view.base_url) as client:
            await self._send(client, cookie | origin | {"Sec-Fetch-Site": "same-origin"})
            try:
                await self._send(client, cookie | origin)
            except _OriginRefused:
                return (
                    "a browser's POST with its cookie passes; not that of browsers from before "
                    "2023, for a proxy rewrites Host: SOTTOVOCE_ALLOWED_ORIGINS helps them"
                )
        return "a browser's POST with its cookie passes"

    async def _export(self) -> str:
        async with self._client() as client:
            answer = await client.get(
                "/api/chat/export", params={"channelId": self._need_channel()}
            )
        if answer.status_code != 200:
            raise Fault(
                f"it got {answer.status_code} {code_of(answer)}", remedy_for(answer.status_code)
            )
        if str(self._marker) not in answer.text:
            raise Fault("the message just sent is not in it", "is an older one kept by a cache?")
        return "has the message"

    async def _heartbeat(self) -> str:
        channel_id = self._need_channel()
        began, heard, ended, opened = trio.current_time(), False, False, False
        try:
            async with (
                self._client() as client,
                open_stream(client, channel_id, headers=_EVENT_SOURCE) as stream,
            ):
                opened = True
                with trio.move_on_after(SILENT_SECONDS):
                    await stream.heartbeat.wait()
                heard = stream.heartbeat.is_set()
        except* (Fault, httpx.HTTPError):
            if not opened:
                raise
            ended = True
        seconds = trio.current_time() - began
        if ended:
            raise Fault(
                f"a silent stream is ended after {seconds:.0f} s",
                "raise the proxy's limit for silence (60 s), or lower SOTTOVOCE_HEARTBEAT_SECONDS",
            )
        if not heard:
            raise Fault(
                f"no heartbeat within {SILENT_SECONDS:g} s",
                "lower SOTTOVOCE_HEARTBEAT_SECONDS to 15, and see that no proxy buffers",
            )
        if seconds > LONG_HEARTBEAT_SECONDS:
            raise Fault(
                f"a heartbeat takes {seconds:.0f} s: Next.js' rewrites end the stream before",
                "lower SOTTOVOCE_HEARTBEAT_SECONDS to 15",
            )
        return f"a silent stream stays: a heartbeat after {seconds:.0f} s"

    async def _send(self, client: httpx.AsyncClient, headers: dict[str, str]) -> str:
        """Send the message, which is stored once; its id. Raises: Fault."""
        body = {
            "channelId": self._need_channel(),
            "content": f"A test of the chat by its operator ({self._marker})",
            "clientMessageId": str(self._marker),
        }
        answer = await client.post("/api/chat/send", json=body, headers=headers)
        if answer.status_code == 200:
            return str(answer.json()["messageId"])
        if code_of(answer) == "ORIGIN_REFUSED":
            raise _OriginRefused(
                "a browser's send is refused (ORIGIN_REFUSED): a proxy rewrites Host",
                "let it pass Host on (nginx: proxy_set_header Host $http_host), or name the "
                "page's origin in SOTTOVOCE_ALLOWED_ORIGINS",
            )
        if answer.status_code == 401 and "Cookie" in headers:
            raise Fault(
                "the cookie does not arrive, or the token has run out", "let the proxy pass Cookie"
            )
        raise Fault(
            f"the send got {answer.status_code} {code_of(answer)}", remedy_for(answer.status_code)
        )

    def _need_channel(self) -> int:
        if self._view.token and self._view.channel_id:
            return self._view.channel_id
        missing = "a channel" if self._view.token else "a token"
        raise Fault(
            f"not tried without {missing}",
            "SOTTOVOCE_TOKEN and --channel: a therapist's, and one of theirs to send a message to",
        )

    def _client(self) -> httpx.AsyncClient:
        return client_of(self._view.base_url, token=self._view.token)


class _OriginRefused(Fault):
    pass


_EVENT_SOURCE = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, deflate, br"}
"""As a browser's EventSource asks; a proxy may decide by it to compress."""
