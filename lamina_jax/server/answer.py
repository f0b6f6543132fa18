"""Writes the answer to one request, whole or in chunks, from what is new of its prompts' continuations.

What both endpoints share; how a choice looks is in `completion_answer` and `chat_answer`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina_jax.core import CompletionOutput, Logprob, Logprobs, RequestOutput
from lamina_jax.server.prompts import Prompt
from lamina_jax.server.protocol import GenerationRequest

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What is new of one choice since it was last told.

    Attributes:
        prompt: that it continues.
        prompt_logprobs: of that prompt, where they are asked for.
        index: among the choices of the answer.
        first: nothing of the choice was told before.
        new: text, tokens and log-probabilities since then, and how it has ended if it has.
        offset: characters of the tokens that were told before.
    """

    prompt: Prompt
    prompt_logprobs: list[Logprobs | None]
    index: int
    first: bool
    new: CompletionOutput
    offset: int


class Answer(ABC):
    """The answer to one request, as its outputs come. What may not be shown yet is kept until it may.

    Args:
        prompts: of the request, in their order.
    """

    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, call_id: str, request: GenerationRequest, prompts: Sequence[Prompt]) -> None:
        self.request, self.prompts = request, prompts
        self._facts = {"id": call_id, "created": int(time.time()), "model": request.model}
        self._untold = [RequestOutput(request_id=call_id) for _ in prompts]
        self._offsets: dict[int, int] = {}
        self._completion_tokens = 0

    @abstractmethod
    def choice(self, growth: Growth) -> dict[str, Any]:
        """A choice, from all of it."""

    @abstractmethod
    def chunk_choice(self, growth: Growth) -> dict[str, Any]:
        """A choice in a chunk."""

    def take(self, prompt: int, news: RequestOutput) -> None:
        """What is new of prompt number `prompt`."""
        if self.request.max_tokens == 0:
            news.outputs = [_nothing(choice) for choice in news.outputs]
        self._completion_tokens += sum(len(choice.token_ids) for choice in news.outputs)
        self._untold[prompt].extend(news)

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        grown = (growth for prompt in range(len(self.prompts)) for growth in self._grow(prompt))
        choices = [self.choice(growth) for growth in grown]
        return {**self._facts, "object": self.OBJECT, "choices": choices, "usage": self.usage()}

    def chunks(self, prompt: int, news: RequestOutput) -> Iterator[dict[str, Any]]:
        """A chunk for every choice of the prompt of which there is something new to see."""
        self.take(prompt, news)
        options = self.request.stream_options
        for growth in self._grow(prompt):
            chunk = {**self._facts, "object": self.CHUNK, "choices": [self.chunk_choice(growth)]}
            if options is not None and (options.continuous_usage_stats or options.include_usage):
                chunk["usage"] = self.usage() if options.continuous_usage_stats else None
            yield chunk

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk that tells the usage, where it is asked for."""
        options = self.request.stream_options
        if options is None or not options.include_usage:
            return None
        return {**self._facts, "object": self.CHUNK, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts, and of all choices so far."""
        prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
        }

    def extras(self, growth: Growth) -> dict[str, Any]:
        """What a choice says beyond OpenAI's fields, where it is asked for."""
        extras: dict[str, Any] = {}
        if self.request.return_token_ids:
            extras["token_ids"] = growth.new.token_ids
        if self.request.prompt_logprobs is not None and growth.first:
            extras["prompt_logprobs"] = [
                known
                and {
                    str(token): entry._asdict() | {"logprob": finite(entry)} for token, entry in known.items()
                }
                for known in growth.prompt_logprobs
            ]
        return extras

    def _grow(self, prompt: int) -> Iterator[Growth]:
        """Of each choice what there is to see and was not told yet. A choice begins with its first token."""
        untold = self._untold[prompt]
        if self._awaits_prompt(prompt):
            return
        shown = [choice for choice in untold.outputs if self._shows(choice)]
        untold.outputs = [choice for choice in untold.outputs if not self._shows(choice)]
        for choice in shown:
            index = prompt * (self.request.n or 1) + choice.index
            offset = self._offsets.get(index, 0)
            yield Growth(
                prompt=self.prompts[prompt],
                prompt_logprobs=untold.prompt_logprobs or [],
                index=index,
                first=index not in self._offsets,
                new=choice,
                offset=offset,
            )
            self._offsets[index] = offset + _length(choice)

    def _awaits_prompt(self, prompt: int) -> bool:
        """Whether what is to be told of the prompt first is not known yet: choices are computed apart."""
        request, given = self.request, self.prompts[prompt]
        tells = request.prompt_logprobs is not None or (given.echo and request.told_logprobs is not None)
        return bool(tells) and len(self._untold[prompt].prompt_logprobs or []) < len(given.token_ids)

    def _shows(self, new: CompletionOutput) -> bool:
        tells_tokens = self.request.return_token_ids or self.request.told_logprobs is not None
        return bool(new.text or new.finish_reason or (tells_tokens and new.token_ids))


def _nothing(choice: CompletionOutput) -> CompletionOutput:
    """What is told of a choice that was to have no tokens: when it ends."""
    return CompletionOutput(index=choice.index, finish_reason=choice.finish_reason and "length", logprobs=[])


def text_of(token: int, entry: Logprob) -> str:
    """A token's own text; its id where there is no tokenizer."""
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _length(new: CompletionOutput) -> int:
    """Characters of tokens whose log-probabilities are known."""
    known = zip(new.token_ids, new.logprobs or [], strict=False)
    return sum(len(text_of(token, entries[token])) for token, entries in known)


def finite(entry: Logprob) -> float:
    return max(entry.logprob, LEAST_LOGPROB)
