"""Requests whose prompts are prefilled elsewhere, from their admission until their KV has arrived.

It owns the numbers of errands, and which are to be begun or dropped. It knows nothing of who runs them, of
pages, of steps, of devices or jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.engine.rows import LiveRequest


@dataclass(frozen=True)
class Errand:
    """KV to be brought for one request.

    Attributes:
        number: of this errand, never used again.
        request_id: of the request.
        tokens: whose KV is to be brought: all that are known of the request but the last, from position 0.
        pages: page ids of the request in order of position.
    """

    number: int
    request_id: str
    tokens: tuple[int, ...]
    pages: tuple[int, ...]


class Errands:
    """Who waits for KV, and what the engine is to be told of it."""

    def __init__(self) -> None:
        self._awaited: dict[int, LiveRequest] = {}
        self._next = 0
        self._begun: list[Errand] = []
        self._dropped: list[int] = []

    def begin(self, request: LiveRequest) -> None:
        """Have the KV of an admitted request brought."""
        request.errand, self._next = self._next, self._next + 1
        self._awaited[request.errand] = request
        # The next token's page is not written to.
        tokens, pages = tuple(request.tokens[:-1]), tuple(request.pages)
        self._begun.append(Errand(request.errand, request.request.request_id, tokens, pages))

    def drop(self, request: LiveRequest) -> None:
        """Nobody waits for a request's KV any more; nothing, if nobody has."""
        if request.errand is not None:
            del self._awaited[request.errand]
            self._dropped.append(request.errand)
            request.errand = None

    def over(self, number: int) -> LiveRequest | None:
        """An errand is over: who has waited for it, if anybody still does."""
        request = self._awaited.pop(number, None)
        if request is not None:
            request.errand = None
        return request

    def news(self) -> tuple[list[Errand], list[int]]:
        """Errands to be begun and numbers of those to be dropped, in this order, since this was asked last.

        An errand that was dropped before it was told is among both.
        """
        news = self._begun, self._dropped
        self._begun, self._dropped = [], []
        return news
