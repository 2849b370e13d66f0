"""What it was measured on, and which cores do what."""

import os
import platform
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

LIBRARIES = (
    "hypercorn", "trio", "httptools", "uvicorn", "uvloop", "starlette", "sse-starlette",
    "psycopg", "redis", "msgspec",
)  # fmt: skip

CORES = sorted(os.sched_getaffinity(0))
CLIENT_CORE = CORES[-1]
"""The servers have the others, from the first."""


def describe_machine() -> dict[str, str]:
    """For the JSON and the report: nothing that names the machine or its owner."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "cpu": _cpu_model(),
        "cores": str(len(CORES)),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "node": _first_line(["node", "--version"]),
        "nginx": _first_line(["nginx", "-v"]).rpartition("/")[2],
        "nchan": _first_line(["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"]),
        "gcc": _first_line(["gcc", "-dumpfullversion"]),
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "open files": f"{soft} (at most {hard})",
        "somaxconn": _read("/proc/sys/net/core/somaxconn"),
        **{name: _version(name) for name in LIBRARIES},
    }


def raise_file_limit() -> int:
    """As many sockets as we are allowed; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def client_on(cores: list[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(pid: int, core: int) -> None:
    """A running process with all of its threads."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), [core])


def kernel_bytes() -> int:
    """What the kernel holds for sockets and its own objects: TCP's pages and the slabs."""
    pages = 0
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if words[0] == "TCP:":
            pages = int(words[words.index("mem") + 1])
    slab = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            slab = int(line.split()[1]) * 1024
    return pages * resource.getpagesize() + slab


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "absent"
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0] if lines else "absent"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def end_process(process: "subprocess.Popen[bytes]", *, seconds: float) -> None:
    """SIGTERM, and SIGKILL where that is not obeyed; also to what it started and left behind."""
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in tree:
            with suppress(psutil.NoSuchProcess):
                child.kill()
