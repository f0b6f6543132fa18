"""A server of completions whose answers a test writes, byte by byte."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

DEADLINE = 20.0


class Scripted:
    """A server that answers every completion with the same lines; it counts, and keeps what it is sent."""

    def __init__(self, *writes: bytes, status: int = 200, pause: float = 0.0) -> None:
        self.writes, self.status, self.pause = writes, status, pause
        self.at_once = self.most_at_once = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    async def models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        return web.json_response({"data": [{"id": "scripted"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        response = web.StreamResponse(status=self.status)
        await response.prepare(request)
        *writes, last = self.writes
        for write in writes:
            await asyncio.sleep(self.pause)
            await response.write(write)
        self.at_once -= 1  # before the client can know that it is over
        await response.write(last)
        return response

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its URL."""
        loop, listening, url = asyncio.new_event_loop(), threading.Event(), []

        async def serve() -> None:
            app = web.Application()
            app.add_routes(
                [web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)]
            )
            self.runner = web.AppRunner(app)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
            host, port = self.runner.addresses[0]
            url.append(f"http://{host}:{port}")
            listening.set()

        def run() -> None:
            loop.run_until_complete(serve())
            loop.run_forever()
            loop.run_until_complete(self.runner.cleanup())
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        assert listening.wait(DEADLINE)
        try:
            yield url[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(DEADLINE)


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def tokens(*ids: int, text: str = "") -> bytes:
    return event(choices=[{"text": text, "token_ids": list(ids)}])


DONE = b"data: [DONE]\n\n"
