"""An application for the engine's tests, which behaves as TINY says."""

import os
from typing import Any

import trio

MODE = os.environ.get("TINY", "")


class TinyApp:
    enabled = True
    unready = ("nobody can be let in",) if MODE == "unready" else ()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        match scope["path"]:
            case "/die":
                os._exit(9)
            case "/fail":
                raise RuntimeError("canary")
            case "/end-lifespan":
                self.end.set()
        body = f"{os.getpid()} {self.enabled}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    answer_full = __call__

    async def _live(self, receive: Any, send: Any) -> None:
        self.end = trio.Event()
        await receive()
        match MODE:
            case "refuses":
                await send({"type": "lifespan.startup.failed", "message": "a finding"})
            case "raises":
                raise RuntimeError("canary")
            case "exits":
                os._exit(7)
        await send({"type": "lifespan.startup.complete"})
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def end_early() -> None:
                await self.end.wait()
                nursery.cancel_scope.cancel()

            await receive()
            nursery.cancel_scope.cancel()
        if not self.end.is_set():
            await send({"type": "lifespan.shutdown.complete"})

    async def drain(self, *, refuse: bool) -> None:
        if MODE == "hangs":
            await trio.sleep_forever()
        print("drained", flush=True)

    def set_enabled(self, enabled: bool) -> None:
        self.enabled = enabled


app = TinyApp()
