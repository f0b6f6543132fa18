"""What waits for the engine on behalf of one HTTP request. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from lamina_jax.core import RequestOutput
from lamina_jax.server.call_meter import CallMeter
from lamina_jax.server.errors import ApiError


class Call:
    """One HTTP request in the engine. News is put together until its reader takes it.

    A reader that is slow gets fewer and larger pieces: it costs no more than its whole answer.

    Args:
        count: how many prompts it has.
        deadline: in the loop's time.
        late: the error that it ends with at its deadline.
        param_of: the field of the request that an error of the engine speaks of.
        meter: hears of its news at once, however slow its reader is.
    """

    def __init__(
        self,
        call_id: str,
        count: int,
        deadline: float,
        late: Callable[[], ApiError],
        param_of: Callable[[str], str],
        meter: CallMeter,
    ) -> None:
        self.id, self.count, self.param_of = call_id, count, param_of
        self._deadline, self._late, self._meter = deadline, late, meter
        self._accepted = False
        self._unfinished = count
        self._news: dict[int, RequestOutput] = {}
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine has taken every prompt. Raises `ApiError` if it does not."""
        while not self._accepted:
            await self._change()

    async def news(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the prompt, what is new of its continuations) until all have ended.

        Raises `ApiError` if the engine, the server or the time of this call comes to its end first.
        """
        while self._unfinished or self._news:
            if not self._news:
                await self._change()
            news, self._news = self._news, {}
            for index, output in news.items():
                yield index, output

    async def whole(self) -> dict[int, RequestOutput]:
        """The continuations of every prompt, by its index, once all have ended; errors as in `news`."""
        while self._unfinished:
            await self._change()
        return self._news

    def accept(self) -> None:
        self._accepted = True
        self._changed.set()

    def put(self, index: int, news: RequestOutput) -> None:
        self._meter.take(index, news)
        if index in self._news:
            self._news[index].extend(news)
        else:
            self._news[index] = news
        self._unfinished -= news.finished
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._changed.set()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._meter.close(self._error.code if self._error is not None else None)

    async def _change(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            self._error = self._late()
            raise self._error from None
        self._changed.clear()
        if self._error is not None:
            raise self._error
