"""What waits for the engine on behalf of one HTTP request. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from lamina_jax.core import RequestOutput
from lamina_jax.server.errors import ApiError


class Call:
    """One HTTP request in the engine. Of each prompt's output only the newest is kept: it is the whole."""

    def __init__(self, call_id: str, count: int, deadline: float) -> None:
        self.id, self.count = call_id, count
        self._deadline = deadline
        self._accepted, self._unfinished = False, count
        self._newest: dict[int, RequestOutput] = {}
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine has taken every prompt. Raises `ApiError` if it does not."""
        while not self._accepted:
            await self._change()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the prompt, its continuation so far) as they grow, until all have ended.

        A reader that is slow gets fewer and larger steps. Raises `ApiError` if the engine, the server or
        the time of this call comes to its end first.
        """
        while self._unfinished:
            if not self._newest:
                await self._change()
            newest, self._newest = self._newest, {}
            for index, output in newest.items():
                self._unfinished -= output.finished
                yield index, output

    def accept(self) -> None:
        self._accepted = True
        self._changed.set()

    def put(self, index: int, output: RequestOutput) -> None:
        self._newest[index] = output
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._changed.set()

    async def _change(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            raise ApiError(
                504, "the request took longer than request_seconds allows", code="timeout"
            ) from None
        self._changed.clear()
        if self._error is not None:
            raise self._error
