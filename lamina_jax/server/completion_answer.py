"""How a choice of `/v1/completions` looks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lamina_jax.core import Logprobs
from lamina_jax.server.answer import Answer, Growth, finite, text_of


class CompletionAnswer(Answer):
    """The answer to a `CompletionRequest`."""

    OBJECT = CHUNK = "text_completion"

    def choice(self, growth: Growth) -> dict[str, Any]:
        echo = self._echo(growth)
        return {
            "index": growth.index,
            "text": self._echoed_text(growth, echo) + growth.text,
            "logprobs": None if self.request.told_logprobs is None else self._logprobs(growth, echo),
            "finish_reason": growth.finish_reason,
            "stop_reason": growth.stop_reason,
            **self.extras(growth),
        }

    chunk_choice = choice

    def _echo(self, growth: Growth) -> list[str]:
        """The texts of the prompt's tokens, where they are to be told now."""
        return self.echo[growth.index // (self.request.n or 1)] if self.echo and growth.first else []

    @staticmethod
    def _echoed_text(growth: Growth, echo: list[str]) -> str:
        if not echo:
            return ""
        return "".join(echo) if growth.output.prompt is None else growth.output.prompt

    def _logprobs(self, growth: Growth, echo: list[str]) -> dict[str, Any]:
        token_ids, known = growth.token_ids, growth.logprobs
        texts = [text_of(token, entry[token]) for token, entry in zip(token_ids, known, strict=True)]
        start = growth.offset + (0 if growth.first else self._prompt_length(growth))
        if echo:
            of_prompt = growth.output.prompt_logprobs or []
            ids = growth.output.prompt_token_ids
            return _table(ids + token_ids, echo + texts, [*of_prompt, *known], 0)
        return _table(token_ids, texts, known, start)

    def _prompt_length(self, growth: Growth) -> int:
        return sum(map(len, self.echo[growth.index // (self.request.n or 1)])) if self.echo else 0


def _table(
    token_ids: Sequence[int], texts: Sequence[str], known: Sequence[Logprobs | None], start: int
) -> dict[str, Any]:
    """Four columns, a row for each token; null where nothing is known (a prompt's first token)."""
    rows = list(zip(token_ids, known, strict=True))
    return {
        "tokens": list(texts),
        "token_logprobs": [None if entry is None else finite(entry[token]) for token, entry in rows],
        "top_logprobs": [None if entry is None else _by_text(entry) for _, entry in rows],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=start)) if texts else [],
    }


def _by_text(known: Logprobs) -> dict[str, float]:
    """Of tokens with one text the most probable."""
    worst_first = sorted(known.items(), key=lambda item: -item[1].rank)
    return {text_of(token, entry): finite(entry) for token, entry in worst_first}
