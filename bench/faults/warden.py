"""Starts and stops PostgreSQL and Valkey for a campaign, in a process of its own.

    python -m bench.faults.warden FOLDER

Starting one blocks, and belongs in a main thread (see `storage.embedded`); the campaign's main
thread measures milliseconds. A JSON line on standard input asks for something, a JSON line on
standard output answers it. At the end of standard input everything is stopped.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from storage.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey

START_SECONDS = 20.0
"""A PostgreSQL that was killed has children, which must have gone before it starts again."""
SNAPSHOT = "dump.rdb"

COPY_SECONDS = 30.0


class Postgres(EmbeddedPostgres):
    """One that can begin as a standby.

    Attributes:
        primary: whose copy it is made as, when it has no data; None: a new one.
    """

    primary: EmbeddedPostgres | None = None

    def forget(self) -> None:
        """Throw its data away, if it has any. It is stopped."""
        shutil.rmtree(self._cluster, ignore_errors=True)

    def _make_cluster(self, binaries: Path, lock: int) -> None:
        if self.primary is None:
            super()._make_cluster(binaries, lock)
            return
        folder = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.data_dir))
        secrets = (folder / "password", self.data_dir / "passfile")
        for path, text in zip(secrets, ("{password}", "*:*:*:*:{password}\n"), strict=True):
            path.touch(mode=0o600)
            path.write_text(text.format(password=self.primary.password))
        if self._account is not None:
            for path in (folder, *secrets):
                os.chown(path, *self._account)
        login = f"host={self.host} port={self.primary.port} user={self.user} passfile={secrets[1]}"
        command = [str(binaries / "pg_basebackup"), "--dbname", login, "--no-password"]
        command += ["--pgdata", str(folder / "data"), "--write-recovery-conf"]
        command += ["--checkpoint=fast", "--no-sync"]
        with (self.data_dir / "copy.log").open("wb") as log:
            process = self._spawn(command, lock, stdin=subprocess.DEVNULL, stdout=log)
        try:
            if process.wait(COPY_SECONDS) != 0:
                raise EmbeddedError(f"the primary was not copied: see {self.data_dir}/copy.log")
        except subprocess.TimeoutExpired:
            raise EmbeddedError("copying the primary takes too long") from None
        finally:
            process.kill()
            process.wait()
        folder.rename(self._cluster)


Server = Postgres | EmbeddedValkey


class Warden:
    def __init__(self, folder: Path) -> None:
        self._postgres = [
            Postgres(folder / f"postgres-{number}", durable=True) for number in (0, 1)
        ]
        self._valkeys = [EmbeddedValkey(folder / "valkey-0", durable=False)]
        self._valkeys.append(
            EmbeddedValkey(folder / "valkey-1", durable=False, password=self._valkeys[0].password)
        )
        for valkey in self._valkeys:
            valkey._config |= {"primaryauth": valkey.password}
        self.servers: dict[str, Server] = {
            "postgres-0": self._postgres[0],
            "postgres-1": self._postgres[1],
            "valkey-0": self._valkeys[0],
            "valkey-1": self._valkeys[1],
        }

    def start(self, name: str, *, empty: bool = True) -> dict[str, Any]:
        """Start it, again if it was killed.

        Args:
            empty: of a Valkey: without the snapshot that it may have written.
        """
        server = self.servers[name]
        if empty and isinstance(server, EmbeddedValkey):
            (server.data_dir / SNAPSHOT).unlink(missing_ok=True)
        deadline = time.monotonic() + START_SECONDS
        while not server.running:
            try:
                server.start()
            except EmbeddedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        return self.about(name)

    def stand_by(self, name: str, *, of: str) -> dict[str, Any]:
        """Start a PostgreSQL as a copy of another, which it follows. What it had is gone."""
        server, primary = self.servers[name], self.servers[of]
        assert isinstance(server, Postgres) and isinstance(primary, Postgres)
        server.stop()
        server.forget()
        server.primary = primary
        return self.start(name)

    def stop(self, name: str) -> dict[str, Any]:
        self.servers[name].stop()
        return {}

    def about(self, name: str) -> dict[str, Any]:
        server = self.servers[name]
        conninfo = server.conninfo if isinstance(server, Postgres) else {}
        return {"pid": server.pid, "port": server.port, "url": server.url, "conninfo": conninfo}

    def stop_all(self) -> None:
        for server in reversed(self.servers.values()):
            server.stop()


def main() -> None:
    warden = Warden(Path(sys.argv[1]))
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(warden, request.pop("do"))(**request)
            except EmbeddedError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        warden.stop_all()


if __name__ == "__main__":
    main()
