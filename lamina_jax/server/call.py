"""What waits for the engine on behalf of one HTTP request. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from lamina_jax.core import RequestOutput
from lamina_jax.server.errors import ApiError


class Call:
    """One HTTP request in the engine. Of each prompt's output only the newest is kept: it is the whole.

    Args:
        count: how many prompts it has.
        deadline: in the loop's time.
        late: the error that it ends with at its deadline.
        param_of: the field of the request that an error of the engine speaks of.
    """

    def __init__(
        self,
        call_id: str,
        count: int,
        deadline: float,
        late: Callable[[], ApiError],
        param_of: Callable[[str], str],
    ) -> None:
        self.id, self.count, self.param_of = call_id, count, param_of
        self._deadline, self._late = deadline, late
        self._echo: list[list[str]] | None = None
        self._unfinished = count
        self._newest: dict[int, RequestOutput] = {}
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    async def accepted(self) -> list[list[str]]:
        """Wait until the engine has taken every prompt; see `messages.Accepted.echo`.

        Raises:
            ApiError: it does not take them.
        """
        while self._echo is None:
            await self._change()
        return self._echo

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

    def accept(self, echo: list[list[str]]) -> None:
        self._echo = echo
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
            raise self._late() from None
        self._changed.clear()
        if self._error is not None:
            raise self._error
