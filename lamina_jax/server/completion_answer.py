"""How a choice of `/v1/completions` looks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lamina_jax.core import Logprobs
from lamina_jax.server.answer import Answer, Growth, finite, text_of
from lamina_jax.server.prompts import Prompt


class CompletionAnswer(Answer):
    """The answer to a `CompletionRequest`."""

    OBJECT = CHUNK = "text_completion"

    def choice(self, growth: Growth) -> dict[str, Any]:
        echoes = bool(growth.prompt.echo) and growth.first
        return {
            "index": growth.index,
            "text": (_text(growth.prompt) if echoes else "") + growth.new.text,
            "logprobs": None if self.request.told_logprobs is None else _logprobs(growth, echoes),
            "finish_reason": growth.new.finish_reason,
            "stop_reason": growth.new.stop_reason,
            **self.extras(growth),
        }

    chunk_choice = choice


def _text(prompt: Prompt) -> str:
    return "".join(prompt.echo) if prompt.text is None else prompt.text


def _logprobs(growth: Growth, echoes: bool) -> dict[str, Any]:
    prompt, ids, known = growth.prompt, growth.new.token_ids, growth.new.logprobs or []
    texts = [text_of(token, entry[token]) for token, entry in zip(ids, known, strict=True)]
    if echoes:
        return _table(prompt.token_ids + ids, prompt.echo + texts, [*growth.prompt_logprobs, *known], 0)
    return _table(ids, texts, known, growth.offset + sum(map(len, prompt.echo)))


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
