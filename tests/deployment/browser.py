"""Debian's Chromium, and people who talk in it on a page of the main application."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.deployment.parts import program
from tests.deployment.servers import Servers

FLAGS = [
    "--no-sandbox",  # a container's root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CLIENTS = 3
"""Prospects of the one therapist, whose page has a stream for each of them. A browser has six
connections to an origin, so three are left for requests."""
CONNECT_SECONDS = 30.0
ALL_BACK_SECONDS = 60.0
"""How long everybody may take to have everything once a trouble has ended. The longest pause that
a client is told is 6 s."""
OPEN = 1
"""`EventSource.OPEN`."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile while the block lasts."""
    with _asyncio_of_its_own(), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium"), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def _asyncio_of_its_own() -> Iterator[None]:
    """Playwright runs an event loop of asyncio beside the test. Once `trio_asyncio` is imported,
    the policy makes loops of its kind, which cannot be run like that."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


class Talk:
    """A therapist and her clients, each on a page with a session's cookie and an `EventSource` for
    each of their channels.

    Each page sends to one of its channels after the other until `check`, whatever happens.
    """

    def __init__(self, servers: Servers, pages: list[tuple[Page, list[int]]]) -> None:
        self._servers = servers
        self._pages = pages

    def begin(self) -> None:
        """Open all streams; return when each of them has shown a message of each side."""
        for page, channels in self._pages:
            page.evaluate("channels => channels.forEach(listen)", channels)
        self._wait(CONNECT_SECONDS, "connected", self._not_open)
        self._send("hello")
        self._wait(CONNECT_SECONDS, "served", self._not_served)
        for page, channels in self._pages:
            page.evaluate("channels => startSending(channels)", channels)

    def check(self) -> None:
        """Every stream came back by itself, and has shown each message once and in order."""
        for page, _ in self._pages:
            page.evaluate("() => stopSending()")
        self._send("last")  # a stream that shows this one is alive
        self._wait(ALL_BACK_SECONDS, "back", self._not_served)
        assert self._not_open() == []
        reports = self._reports()
        sent = [message for report in reports for message in report["sent"]]
        channels = {channel for channel, _ in self._streams()}
        stored = [message for channel in channels for message, _ in self._servers.stored(channel)]
        assert sorted(sent) == sorted(stored), "what was acknowledged is not what is stored"

    def pause(self, seconds: float) -> None:
        """The pages go on meanwhile."""
        self._pages[0][0].wait_for_timeout(seconds * 1000)

    def _send(self, text: str) -> None:
        for page, channels in self._pages:
            for channel in channels:
                page.evaluate("([channel, text]) => send(channel, text)", [channel, text])
        assert not any(report["refusals"] for report in self._reports()), self._reports()

    def everybody(self, what: str) -> list[int]:
        """A count of every stream: `opened`, `failed` or `resets`."""
        return [stream[what] for _, stream in self._streams()]

    def closings(self) -> list[str]:
        """Why streams were ended, as the pages were told."""
        return [reason for _, stream in self._streams() for reason in stream["closings"]]

    def _not_open(self) -> list[str]:
        return [
            f"{channel}: {stream}"
            for channel, stream in self._streams()
            if stream["state"] != OPEN or not stream.get("connected")
        ]

    def _not_served(self) -> list[str]:
        """Streams whose page has not seen exactly what is stored, in its order."""
        return [
            f"{channel}: {stream}, stored {stored}"
            for channel, stream in self._streams()
            if [tuple(seen) for seen in stream["seen"]] != (stored := self._servers.stored(channel))
        ]

    def _streams(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for report in self._reports():
            for channel, stream in report["streams"].items():
                yield int(channel), stream

    def _reports(self) -> list[dict[str, Any]]:
        return [page.evaluate("() => report()") for page, _ in self._pages]

    def _wait(self, seconds: float, what: str, look: Any) -> None:
        """Waits until `look` finds nothing that is missing."""
        deadline = time.monotonic() + seconds
        while missing := look():
            assert time.monotonic() < deadline, f"not {what} after {seconds} s: {missing}"
            self.pause(0.1)


@contextmanager
def talking(browser: Browser, url: str, servers: Servers) -> Iterator[Talk]:
    """New people on the page at `url`, each of whom has been heard once."""
    chat = servers.chat
    therapist = chat.therapist()
    pairs = [chat.pair(therapist) for _ in range(CLIENTS)]
    visitors = [(pair.prospect, [pair.channel_id]) for pair in pairs]
    visitors.append((therapist, [pair.channel_id for pair in pairs]))
    with ExitStack() as cleanup:
        talk = Talk(
            servers,
            [
                (cleanup.enter_context(_visit(browser, url, chat.token(person))), channels)
                for person, channels in visitors
            ],
        )
        talk.begin()
        yield talk


@contextmanager
def _visit(browser: Browser, url: str, token: str) -> Iterator[Page]:
    context = browser.new_context()
    try:
        context.add_cookies([{"name": "__session", "value": token, "url": url}])
        page = context.new_page()
        page.goto(f"{url}/page.html")
        yield page
    finally:
        context.close()
