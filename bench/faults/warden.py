"""Starts and stops PostgreSQL and Valkey for a campaign, in a process of its own.

    python -m bench.faults.warden FOLDER

Starting one blocks, and belongs in a main thread (see `storage.embedded`); the campaign's main
thread measures milliseconds. A JSON line on standard input asks for something, a JSON line on
standard output answers it. At the end of standard input everything is stopped.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from storage.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey

START_SECONDS = 20.0
"""A PostgreSQL that was killed has children, which must have gone before it starts again."""
SNAPSHOT = "dump.rdb"

Server = EmbeddedPostgres | EmbeddedValkey


class Warden:
    def __init__(self, folder: Path) -> None:
        self._postgres = EmbeddedPostgres(folder / "postgres", durable=True)
        self._valkeys = [EmbeddedValkey(folder / "valkey-0", durable=False)]
        self._valkeys.append(
            EmbeddedValkey(folder / "valkey-1", durable=False, password=self._valkeys[0].password)
        )
        for valkey in self._valkeys:
            valkey._config |= {"primaryauth": valkey.password}
        self.servers: dict[str, Server] = {
            "postgres": self._postgres,
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

    def stop(self, name: str) -> dict[str, Any]:
        self.servers[name].stop()
        return {}

    def about(self, name: str) -> dict[str, Any]:
        server = self.servers[name]
        conninfo = server.conninfo if isinstance(server, EmbeddedPostgres) else {}
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
