"""How a choice of `/v1/chat/completions` looks."""

from __future__ import annotations

from typing import Any

from lamina_jax.core import Logprob, Logprobs
from lamina_jax.server.answer import Answer, Growth, finite, text_of


class ChatAnswer(Answer):
    """The answer to a `ChatRequest`."""

    OBJECT, CHUNK = "chat.completion", "chat.completion.chunk"

    def choice(self, growth: Growth) -> dict[str, Any]:
        message = {"role": "assistant", "content": growth.new.text, "refusal": None}
        return {"index": growth.index, "message": message, **self._rest(growth)}

    def chunk_choice(self, growth: Growth) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if growth.first else {}
        if growth.new.text or growth.first:
            delta["content"] = growth.new.text
        return {"index": growth.index, "delta": delta, **self._rest(growth)}

    def _rest(self, growth: Growth) -> dict[str, Any]:
        return {
            "logprobs": self._logprobs(growth),
            "finish_reason": growth.new.finish_reason,
            "stop_reason": growth.new.stop_reason,
            **self.extras(growth),
        }

    def _logprobs(self, growth: Growth) -> dict[str, Any] | None:
        top = self.request.told_logprobs
        if top is None:
            return None
        tokens = zip(growth.new.token_ids, growth.new.logprobs or [], strict=True)
        return {"content": [_token(token, known, top) for token, known in tokens], "refusal": None}


def _token(token: int, known: Logprobs, top: int) -> dict[str, Any]:
    """A token, and the `top` best in its place."""
    best = sorted(known.items(), key=lambda item: item[1].rank)[:top]
    others = [_entry(other, entry) for other, entry in best if entry.rank <= top]
    return {**_entry(token, known[token]), "top_logprobs": others}


def _entry(token: int, entry: Logprob) -> dict[str, Any]:
    text = text_of(token, entry)
    whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it is a part of a character, its bytes not known
    return {"token": text, "logprob": finite(entry), "bytes": list(text.encode()) if whole else None}
