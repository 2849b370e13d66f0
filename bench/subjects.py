"""Who is measured, and how each is started: as its own documentation recommends.

Every server gets a core of its own where there are two; what it needs besides (PostgreSQL,
Valkey) shares the other with the client.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]

from bench.client import MARK, Address, Page, Refused
from bench.machine import CORES, end_process, pin

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".bench"
"""What is installed, compiled and kept for the benchmark; ignored by git."""
PEERS = ROOT / "bench" / "peers"
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")

START_SECONDS = 60.0
STOP_SECONDS = 20.0

PAYLOAD = MARK + b"0123456789" * 9 + b"012345"
"""With `data: ` and two line feeds an event of 105 bytes."""


class Pair(msgspec.Struct, frozen=True):
    """A line of `sottovoce seed`."""

    channel_id: int
    therapist_token: str
    prospect_token: str

    def __repr__(self) -> str:
        return f"<Pair {self.channel_id}>"


class Server:
    """One that runs.

    Attributes:
        addresses: one, or one for each process where they do not share a socket.
        pids: of the processes that serve.
        page: what its streams have received when they are complete.
    """

    def __init__(
        self, addresses: Sequence[Address], pids: Sequence[int], *, page: Page | None = None
    ) -> None:
        self.addresses = addresses
        self.pids = pids
        self.page = page or Page()
        self._processes = [psutil.Process(pid) for pid in pids]

    def stream_requests(self, count: int) -> list[bytes]:
        """For that many streams on one channel."""
        return [get("/events")] * count

    def publish_request(self) -> bytes:
        """A POST that puts one event on that channel."""
        return post("/publish", PAYLOAD, "text/plain")

    def answer_request(self) -> bytes:
        """A POST that only gets its answer."""
        return post("/answer", b"{}", "text/plain")

    @property
    def rss(self) -> int:
        """Bytes, of all its processes."""
        return sum(process.memory_info().rss for process in self._processes)

    @property
    def cpu_seconds(self) -> float:
        """Of all its processes, in user and kernel."""
        times = [process.cpu_times() for process in self._processes]
        return float(sum(spent.user + spent.system for spent in times))


class Subject(msgspec.Struct, frozen=True):
    """Something to measure.

    `start` takes the number of processes. `missing` says what it lacks here, or nothing.
    """

    name: str
    label: str
    start: Callable[[int], AbstractContextManager[Server]]
    missing: Callable[[], str]
    two: bool = True
    """Whether it can run as two processes."""


def get(path: str, token: str = "") -> bytes:
    credential = f"Authorization: Bearer {token}\r\n" if token else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n{credential}\r\n"
    ).encode()


def post(path: str, body: bytes, content_type: str, token: str = "") -> bytes:
    credential = f"Authorization: Bearer {token}\r\n" if token else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{credential}\r\n"
    )
    return head.encode() + body


# Sottovoce itself


class Sottovoce(Server):
    """`sottovoce dev`: real tokens, access, PostgreSQL that commits durably, Valkey.

    Attributes:
        database_url, redis_url: of its PostgreSQL and Valkey.
        postgres_pid, redis_pid: theirs.
        pairs: seeded people, each pair with a channel.
    """

    def __init__(self, ready: "_Ready", data_dir: Path, pairs: Sequence[Pair]) -> None:
        host, _, port = ready.base_url.removeprefix("http://").rpartition(":")
        super().__init__([(host, int(port))], ready.pids.workers, page=Page(b'"connected"'))
        self.database_url, self.redis_url = ready.database_url, ready.redis_url
        self.postgres_pid, self.redis_pid = ready.pids.postgres, ready.pids.redis
        self.pairs = pairs
        self._data_dir = data_dir

    def stream_requests(self, count: int) -> list[bytes]:
        return [self.stream_request(self.pairs[0], i % 2 == 0) for i in range(count)]

    def publish_request(self) -> bytes:
        return self.send_request(self.pairs[0], PAYLOAD.decode())

    def stream_request(self, pair: Pair, therapist: bool) -> bytes:
        token = pair.therapist_token if therapist else pair.prospect_token
        return get(f"/api/chat/{pair.channel_id}", token)

    def send_request(self, pair: Pair, text: str) -> bytes:
        body = {"channelId": pair.channel_id, "content": text, "messageType": "STANDARD"}
        encoded = msgspec.json.encode(body)
        return post("/api/chat/send", encoded, "application/json", pair.therapist_token)

    def answer_request(self) -> bytes:
        raise NotImplementedError("every POST of the chat needs a token and does something")

    def seed(self, count: int) -> Sequence[Pair]:
        """New people, whose tokens nobody has seen yet."""
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            out = Path(folder) / "pairs"
            arguments = ["seed", "--channels", str(count), "--out", str(out)]
            arguments += ["--data-dir", str(self._data_dir)]
            subprocess.run(
                [*_SOTTOVOCE, *arguments],
                check=True,
                timeout=300,
                env=_environment({}),
                stdout=subprocess.DEVNULL,
            )
            return [msgspec.json.decode(line, type=Pair) for line in out.read_bytes().splitlines()]


_SOTTOVOCE = [sys.executable, "-c", "from server.cli import main; main()"]


class _Pids(msgspec.Struct):
    workers: list[int]
    postgres: int
    redis: int


class _Ready(msgspec.Struct):
    base_url: str
    database_url: str
    redis_url: str
    pids: _Pids


@contextmanager
def sottovoce(
    processes: int,
    *,
    pairs: int = 1,
    pinned: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Sottovoce]:
    """The real server on an empty database.

    Args:
        processes: workers.
        pairs: seeded before it is measured.
        pinned: whether the workers have the servers' cores; else everything runs anywhere.
        settings: over the ones below, by their environment names.
    """
    # Its limits protect it from what we do on purpose: thousands of streams and sends of one
    # person. Nothing else differs from what `sottovoce dev` has by itself.
    environ = {
        "SOTTOVOCE_MAX_STREAMS": "19800",
        "SOTTOVOCE_MAX_STREAMS_PER_USER": "19800",
        "SOTTOVOCE_MAX_SENDS_PER_SECOND": "1000000",
        "SOTTOVOCE_LOG_FORMAT": "json",
        **(settings or {}),
    }
    with _folder() as folder, ExitStack() as stack:
        data_dir, ready_file = folder / "data", folder / "ready.json"
        arguments = ["dev", "--port", "0", "--workers", str(processes)]
        arguments += ["--data-dir", str(data_dir), "--ready-file", str(ready_file)]
        process = stack.enter_context(_process([*_SOTTOVOCE, *arguments], env=environ))
        _until(ready_file.exists, process)
        ready = msgspec.json.decode(ready_file.read_bytes(), type=_Ready)
        server = Sottovoce(ready, data_dir, [])
        server.pairs = server.seed(pairs)
        if pinned:
            for number, pid in enumerate(server.pids):
                pin(pid, _core(number))
        yield server


# The peers


@contextmanager
def engine(processes: int) -> Iterator[Server]:
    """Our engine with an application that is not ours to make fast: the same as uvicorn's."""
    needed = {
        "UPSTASH_REDIS_URL": "redis://127.0.0.1",
        "DB_HOST": "127.0.0.1",
        "DB_USER": "nobody",
        "DB_DATABASE": "none",
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_MTI3LjAuMC4xJA==",
        "SOTTOVOCE_DRAIN_SECONDS": "1",
    }
    with ExitStack() as stack:
        addresses, pids = [], []
        for number in range(processes):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status, its_end = os.pipe()
            stack.callback(os.close, status)
            lifeline, our_end = os.pipe()
            stack.callback(os.close, our_end)
            command = [sys.executable, "-m", "server.engine.worker", "--fd"]
            command += [str(listener.fileno()), "--ready-fd", str(its_end)]
            process = stack.enter_context(
                _process(
                    [*_on(number), *command, "--app", "bench.peers.asgi:app"],
                    env=needed,
                    stdin=lifeline,
                    pass_fds=[listener.fileno(), its_end],
                )
            )
            os.close(lifeline)
            os.close(its_end)
            if os.read(status, 1) != b"1":
                raise Refused("the engine did not start")
            addresses.append(listener.getsockname())
            pids.append(process.pid)
        yield Server(addresses, pids)


def _python_peer(*arguments: str) -> Callable[[int], AbstractContextManager[Server]]:
    """A server of Python's that is told its port; PORT stands for it."""
    return _peer(sys.executable, *arguments)


def _peer(*arguments: str) -> Callable[[int], AbstractContextManager[Server]]:
    @contextmanager
    def start(processes: int) -> Iterator[Server]:
        with ExitStack() as stack:
            addresses, pids = [], []
            for number in range(processes):
                port = _free_port()
                command = [argument.replace("PORT", str(port)) for argument in arguments]
                process = stack.enter_context(_process([*_on(number), *command], env={}))
                _until(lambda port=port: _answers(port), process)  # type: ignore[misc]
                addresses.append(("127.0.0.1", port))
                pids += _serving_pids(process.pid)
            yield Server(addresses, pids)

    return start


@contextmanager
def nchan(processes: int) -> Iterator[Server]:
    """nginx knows workers of its own: one socket, and memory that they share."""
    with _folder() as folder, ExitStack() as stack:
        port = _free_port()
        text = (PEERS / "nchan.conf").read_text()
        for name, value in {
            "PREFIX": str(folder),
            "PORT": str(port),
            "WORKERS": str(processes),
            "AFFINITY": " ".join(f"{1 << _core(number):b}" for number in range(processes)),
            "USER": "user root;" if os.geteuid() == 0 else "",
        }.items():
            text = text.replace(name, value)
        (folder / "nginx.conf").write_text(text)
        command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
        process = stack.enter_context(_process(command, env={}))
        _until(lambda: _answers(port), process)
        workers = [child.pid for child in psutil.Process(process.pid).children()]
        yield Server([("127.0.0.1", port)], workers)


@contextmanager
def write_loop(processes: int) -> Iterator[Server]:
    program = _compiled("write_loop.c")
    with _peer(str(program), "PORT")(processes) as server:
        yield server


_ASGI = "bench.peers.asgi:app"
_UVICORN = (
    "-m", "uvicorn", "--port", "PORT", "--loop", "uvloop", "--http", "httptools",
    "--log-level", "warning", "--no-access-log", "--backlog", "4096",
)  # fmt: skip
_HYPERCORN = (
    "-m", "hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:PORT",
    "--log-level", "warning", "--backlog", "4096",
)  # fmt: skip


def _needs(*modules: str) -> Callable[[], str]:
    def missing() -> str:
        absent = [module for module in modules if find_spec(module) is None]
        return f"no {', '.join(absent)}: pip install '.[bench]'" if absent else ""

    return missing


def _no_better_sse() -> str:
    if shutil.which("node") is None:
        return "no node"
    if not (WORK / "node" / "node_modules" / "better-sse").exists():
        return "no better-sse: make bench-peers"
    return ""


def _no_nchan() -> str:
    if shutil.which("nginx") is None or not NCHAN_MODULE.exists():
        return "no nginx with nchan: make bench-peers"
    return ""


def _no_compiler() -> str:
    return "" if shutil.which("gcc") else "no gcc"


def _nothing() -> str:
    return ""


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("sottovoce", "Sottovoce", sottovoce, _nothing),
        Subject("engine", "its engine, raw ASGI", engine, _nothing),
        Subject("nchan", "nchan in nginx (C)", nchan, _no_nchan),
        Subject(
            "better-sse",
            "better-sse on Node",
            _peer("node", str(PEERS / "better_sse.mjs"), "PORT", str(WORK / "node")),
            _no_better_sse,
        ),
        Subject(
            "uvicorn",
            "raw ASGI on uvicorn",
            _python_peer(*_UVICORN, _ASGI),
            _needs("uvicorn", "uvloop", "httptools"),
        ),
        Subject(
            "sse-starlette",
            "sse-starlette on uvicorn",
            _python_peer(*_UVICORN, "bench.peers.sse_starlette_app:app"),
            _needs("sse_starlette", "uvicorn", "uvloop", "httptools"),
        ),
        Subject(
            "hypercorn",
            "raw ASGI on stock Hypercorn",
            _python_peer(*_HYPERCORN, _ASGI),
            _needs("hypercorn"),
        ),
        Subject("write-c", "only write, C (the limit)", write_loop, _no_compiler),
        Subject(
            "write-python",
            "only send, Python",
            _python_peer(str(PEERS / "write_loop.py"), "PORT"),
            _nothing,
        ),
    )
}


# Processes


@contextmanager
def _process(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ended with the block, with all that it has started."""
    log = WORK / "log" / "servers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"\n== {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(env),
            cwd=ROOT,
            pass_fds=pass_fds,
        )
    try:
        yield process
    finally:
        end_process(process, seconds=STOP_SECONDS)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, without the settings of whatever else runs on this machine."""
    ours = ("SOTTOVOCE_", "NEXT_PUBLIC_", "DB_", "CLERK_", "UPSTASH_", "PROMETHEUS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"NODE_ENV": "production", "PYTHONPATH": str(ROOT)} | dict(extra)


def _on(number: int) -> list[str]:
    """The start of a command that runs as a subject's process of that number."""
    return ["taskset", "-c", str(_core(number))]


def _core(number: int) -> int:
    """One each. Of two cores the second is the client's, too."""
    return CORES[number % len(CORES)]


def _serving_pids(pid: int) -> list[int]:
    """A supervisor that only waits is none of them."""
    children = psutil.Process(pid).children(recursive=True)
    busy = [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    return busy or [pid]


def _until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        if process.poll() is not None:
            raise Refused(f"it ended with {process.returncode}: {WORK / 'log' / 'servers.log'}")
        if time.monotonic() > deadline:
            raise Refused(f"it is not ready after {START_SECONDS:.0f} s")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


@contextmanager
def _folder() -> Iterator[Path]:
    """Under .bench, on the same disk as the checkout: a temporary file system would flatter."""
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may run as somebody else
        yield Path(folder)


@cache
def _compiled(source: str) -> Path:
    program = WORK / source.removesuffix(".c")
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-o", str(program), str(PEERS / source)], check=True, timeout=60
    )
    return program
