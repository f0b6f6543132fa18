"""The server's end of its engine's socket: messages out, events in. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from lamina_jax.server.engine_host import EngineHost
from lamina_jax.server.frames import EVENTS, FrameError, pack, read
from lamina_jax.server.messages import Died, Event, Message, Stop

LAST_SECONDS = 1.0
"""Between the end of an engine's socket and the end of its process."""

LOOK_SECONDS = 0.02
"""Between two looks at whether it has ended."""


class EngineLink:
    """Talks to an engine, and ends it.

    Args:
        host: where it runs.
    """

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self._host.connection)

    def send(self, message: Message) -> None:
        """Give the engine a message; an engine that is gone hears nothing. Raises `FrameError`."""
        data = pack(message)
        if not self._writer.is_closing():
            self._writer.write(data)

    async def events(self) -> AsyncIterator[Event]:
        """What the engine says, in order. The last of them is `Died`, however it ends."""
        while True:
            try:
                event: Event = await read(self._reader, EVENTS)
            except FrameError as error:
                event = Died(f"it said what cannot be read: {error}")
            except (EOFError, OSError):
                event = Died(f"its process {await self._ended(LAST_SECONDS) or 'speaks no more'}")
            yield event
            if isinstance(event, Died):
                return

    async def close(self, seconds: float) -> None:
        """Have the engine end by itself within so many seconds; 0, or after them: kill it."""
        if seconds:
            self.send(Stop())
        if await self._ended(seconds) is None:
            self._host.kill()
            await self._ended(LAST_SECONDS)
        self._writer.close()

    async def _ended(self, seconds: float) -> str | None:
        """How the engine has ended, after so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._host.ended() is None:
                    await asyncio.sleep(LOOK_SECONDS)
        return self._host.ended()
