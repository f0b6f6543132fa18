"""The server's end of its engine's socket: messages out, events in. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from lamina_jax.server.engine_host import EngineHost
from lamina_jax.server.frames import EVENTS, FrameError, pack, read
from lamina_jax.server.messages import Died, Event, Message, Stop

LAST_SECONDS = 1.0
"""Between the end of an engine's socket and the end of its process."""


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
                how = await asyncio.to_thread(self._host.ended, LAST_SECONDS)
                event = Died(f"its process {how or 'speaks no more'}")
            yield event
            if isinstance(event, Died):
                return

    async def close(self, seconds: float) -> None:
        """Have the engine end by itself within so many seconds; 0, or after them: kill it."""
        if seconds:
            self.send(Stop())
        if await asyncio.to_thread(self._host.ended, seconds) is None:
            self._host.kill()
            await asyncio.to_thread(self._host.ended, LAST_SECONDS)
        self._writer.close()
