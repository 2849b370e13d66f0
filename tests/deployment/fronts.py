"""What stands before the servers: the files of docs/how-to/proxies, run as they are.

What is exchanged in them is addresses and, where a test would have to wait for it, times.
"""

import http.server
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.deployment.parts import npm_folder, program

RECIPES = Path(__file__).parents[2] / "docs" / "how-to" / "proxies"
PAGE = Path(__file__).parent / "page.html"
START_SECONDS = 60.0
BUILD_SECONDS = 300.0
GRACE_SECONDS = 1.0


class Ports(NamedTuple):
    """Where everything is on 127.0.0.1."""

    front: int
    servers: tuple[int, int]
    application: int


class Proxy(NamedTuple):
    """A proxy, and what a test exchanges in its file.

    Attributes:
        recipe: its file's name in `RECIPES`.
        command: of the file's copy, what runs it; the program's name first.
        limits: numbers that this machine may not allow.
        hurried: times that a frozen server would make a test wait for.
    """

    recipe: str
    command: Callable[[Path], list[str]]
    limits: Mapping[str, str]
    hurried: Mapping[str, str]


PROXIES = {
    "nginx": Proxy(
        "nginx.conf",
        lambda file: ["nginx", "-p", str(file.parent), "-c", str(file), "-g",
                      f"daemon off; pid {file.parent}/pid; error_log stderr;"],
        {"200000": "1000", "100000": "500"},
        {"60s": "3s", "15s": "3s"},
    ),
    "haproxy": Proxy(
        "haproxy.cfg",
        lambda file: ["haproxy", "-db", "-f", str(file)],
        {"200000": "1000"},
        {"60s": "3s"},
    ),
    "caddy": Proxy(
        "Caddyfile",
        lambda file: ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)],
        {},
        {"60s": "3s"},
    ),
}  # fmt: skip
NEXT = ("next-14", "next-15", "next-16")
NEXT_HURRIED = {
    "ANSWER_MS = 15_000": "ANSWER_MS = 3_000",
    "SILENCE_MS = 60_000": "SILENCE_MS = 3_000",
}
EARLIER_ROUTE = """
const gone = () => new Response("an earlier chat", { status: 410 });
export { gone as GET, gone as POST };
"""
_next_builds: dict[str, bool] = {}
"""Which are built, and whether hurried: it takes a quarter of a minute."""
VITE_HURRIED = {"60_000": "3_000"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def exchanged(recipe: str, *exchanges: Mapping[str, str]) -> str:
    """The recipe's text with other addresses and times; each of them must be in it."""
    text = (RECIPES / recipe).read_text("utf-8")
    for exchange in exchanges:
        for ours, theirs in exchange.items():
            assert ours in text, f"{recipe} has no {ours}"
            text = text.replace(ours, theirs)
    return text


@contextmanager
def front(
    name: str, servers: tuple[int, int], folder: Path, *, hurried: bool = True
) -> Iterator[str]:
    """The URL of a running proxy, Next.js or Vite that shows the page and knows the servers.

    Args:
        name: one of `PROXIES`, of `NEXT`, or "vite".
        servers: their ports.
        folder: an empty one.
        hurried: with short times in place of its file's.
    """
    with ExitStack() as cleanup:
        ports = Ports(free_port(), servers, cleanup.enter_context(_application()))
        if name in PROXIES:
            command = _proxy(PROXIES[name], ports, folder, hurried=hurried)
            environ, where = {}, folder
        elif name in NEXT:
            where = _next(name, hurried=hurried)
            command = [program("node"), "node_modules/next/dist/bin/next", "start"]
            command += ["-H", "127.0.0.1", "-p", str(ports.front)]
            urls = ",".join(f"http://127.0.0.1:{port}" for port in servers)
            environ = {"SOTTOVOCE_SERVERS": urls, "NEXT_TELEMETRY_DISABLED": "1"}
        else:
            where = cleanup.enter_context(_vite(ports, hurried=hurried))
            command = [program("node"), "../node_modules/vite/bin/vite.js"]
            command += ["--host", "127.0.0.1", "--port", str(ports.front), "--strictPort"]
            environ = {}
        log = folder / "log"
        cleanup.enter_context(_running(command, where, environ, log, ports.front))
        yield f"http://127.0.0.1:{ports.front}"


@contextmanager
def _application() -> Iterator[int]:
    """The main application: it has one page. Its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _proxy(proxy: Proxy, ports: Ports, folder: Path, *, hurried: bool) -> list[str]:
    one, two = ports.servers
    addresses = {
        "127.0.0.1:8001": f"127.0.0.1:{one}",
        "127.0.0.1:8002": f"127.0.0.1:{two}",
        "127.0.0.1:3000": f"127.0.0.1:{ports.application}",
        "8080": str(ports.front),
    }
    file = folder / proxy.recipe
    times = proxy.hurried if hurried else {}
    file.write_text(exchanged(proxy.recipe, proxy.limits, times, addresses))
    name, *arguments = proxy.command(file)
    return [program(name), *arguments]


def _next(name: str, *, hurried: bool) -> Path:
    """Next.js builds the recipe among its packages, and the page is one of its public files.

    The routes of an earlier chat are left in its place: none of them may answer.
    """
    folder = npm_folder(name)
    if _next_builds.get(name) == hurried:
        return folder
    for old in ("app", "public", ".next"):
        shutil.rmtree(folder / old, ignore_errors=True)
    shutil.copytree(RECIPES / "nextjs", folder, dirs_exist_ok=True)
    for earlier in ("[channelId]", "send", "messaging", "export"):
        (folder / "app/api/chat" / earlier).mkdir(parents=True)
        (folder / "app/api/chat" / earlier / "route.js").write_text(EARLIER_ROUTE)
    (folder / "public").mkdir()
    shutil.copy(PAGE, folder / "public")
    if hurried:
        recipe = "app/sottovoce/[...path]/route.ts"
        (folder / recipe).write_text(exchanged(f"nextjs/{recipe}", NEXT_HURRIED))
    built = subprocess.run(
        [program("node"), "node_modules/next/dist/bin/next", "build"],
        cwd=folder,
        env={**os.environ, "NEXT_TELEMETRY_DISABLED": "1", "CI": "1"},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    _next_builds[name] = hurried
    return folder


@contextmanager
def _vite(ports: Ports, *, hurried: bool) -> Iterator[Path]:
    """A folder beside Vite's packages, for Vite starts anew when its file changes."""
    with tempfile.TemporaryDirectory(dir=npm_folder("vite"), prefix="app-") as name:
        folder = Path(name)
        address = {"127.0.0.1:8001": f"127.0.0.1:{ports.servers[0]}"}
        config = exchanged("vite/vite.config.js", address, VITE_HURRIED if hurried else {})
        (folder / "vite.config.js").write_text(config)
        (folder / "package.json").write_text('{"type": "module"}')
        (folder / "public").mkdir()
        shutil.copy(PAGE, folder / "public")
        yield folder


@contextmanager
def _running(
    command: list[str], where: Path, environ: Mapping[str, str], log: Path, port: int
) -> Iterator[None]:
    """The process, once the page and the servers answer through it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=where,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
            while not _serves(client):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield
    finally:
        process.terminate()  # nginx ends its workers
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # Caddy waits for those who are connected
            process.kill()
            process.wait()


def _serves(client: httpx.Client) -> bool:
    with suppress(httpx.HTTPError):
        # The server's own answer to somebody without a token: the proxy has found it.
        chat = client.get("/api/chat/availability").status_code
        return chat == 401 and client.get("/page.html").status_code == 200
    return False
