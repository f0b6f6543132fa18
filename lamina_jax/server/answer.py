"""Writes the answer to one request, whole or in chunks, from the outputs of its prompts.

What both endpoints share; how a choice looks is in `completion_answer` and `chat_answer`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina_jax.core import CompletionOutput, Logprob, Logprobs, RequestOutput
from lamina_jax.server.protocol import GenerationRequest

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What is new of one choice since it was last told.

    Attributes:
        output: what its prompt has got so far.
        index: among the choices of the answer.
        first: nothing of the choice was told before.
        text, token_ids, logprobs: the new ones.
        offset: characters of the tokens that were told before.
        finish_reason, stop_reason: as they are now.
    """

    output: RequestOutput
    index: int
    first: bool
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    offset: int
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class _Told:
    """How much of a choice has been told."""

    text: int = 0
    tokens: int = 0
    offset: int = 0
    ended: bool = False


class Answer(ABC):
    """The answer to one request, as its outputs come.

    Outputs are whole continuations so far; a chunk says what is new in them.

    Args:
        echo: for each prompt, the text of each of its tokens, where the request echoes.
    """

    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, call_id: str, request: GenerationRequest, echo: list[list[str]]) -> None:
        self.request, self.echo = request, echo
        self._facts = {"id": call_id, "created": int(time.time()), "model": request.model}
        self._outputs: dict[int, RequestOutput] = {}
        self._told: dict[int, _Told] = {}

    @abstractmethod
    def choice(self, growth: Growth) -> dict[str, Any]:
        """A choice, from all of it."""

    @abstractmethod
    def chunk_choice(self, growth: Growth) -> dict[str, Any]:
        """A choice in a chunk."""

    def take(self, prompt: int, output: RequestOutput) -> None:
        """What prompt number `prompt` has got so far."""
        self._outputs[prompt] = output

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        outputs = sorted(self._outputs.items())
        choices = [self.choice(growth) for prompt, output in outputs for growth in self._grow(prompt, output)]
        return {**self._facts, "object": self.OBJECT, "choices": choices, "usage": self.usage()}

    def chunks(self, prompt: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """A chunk for every choice of the prompt of which there is something new to see."""
        self.take(prompt, output)
        options = self.request.stream_options
        for growth in () if self._awaits_prompt(output) else self._grow(prompt, output):
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
        """Tokens of all prompts and choices so far."""
        outputs = self._outputs.values()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        told = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        completion = 0 if self.request.max_tokens == 0 else told
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def extras(self, growth: Growth) -> dict[str, Any]:
        """What a choice says beyond OpenAI's fields, where it is asked for."""
        extras: dict[str, Any] = {}
        if self.request.return_token_ids:
            extras["token_ids"] = growth.token_ids
        if self.request.prompt_logprobs is not None and growth.first:
            extras["prompt_logprobs"] = [
                known
                and {
                    str(token): entry._asdict() | {"logprob": finite(entry)} for token, entry in known.items()
                }
                for known in growth.output.prompt_logprobs or []
            ]
        return extras

    def _grow(self, prompt: int, output: RequestOutput) -> Iterator[Growth]:
        """Of each choice what there is to see and was not told yet. A choice begins with its first token."""
        for choice in output.outputs:
            index = prompt * (self.request.n or 1) + choice.index
            growth = self._growth(index, output, choice)
            if self._shows(growth) and not self._told.get(index, _Told()).ended:
                offset = growth.offset + _length(growth.token_ids, growth.logprobs)
                ended = choice.finish_reason is not None
                self._told[index] = _Told(len(choice.text), len(choice.token_ids), offset, ended)
                yield growth

    def _awaits_prompt(self, output: RequestOutput) -> bool:
        """Whether what is to be told of the prompt first is not known yet: choices are computed apart."""
        request = self.request
        tells = request.prompt_logprobs is not None or (self.echo and request.told_logprobs is not None)
        return bool(tells) and len(output.prompt_logprobs or []) < len(output.prompt_token_ids)

    def _growth(self, index: int, output: RequestOutput, choice: CompletionOutput) -> Growth:
        told, drop = self._told.get(index, _Told()), self.request.max_tokens == 0
        return Growth(
            output=output,
            index=index,
            first=index not in self._told,
            text="" if drop else choice.text[told.text :],
            token_ids=[] if drop else choice.token_ids[told.tokens :],
            logprobs=[] if drop else (choice.logprobs or [])[told.tokens :],
            offset=told.offset,
            finish_reason="length" if drop and choice.finish_reason else choice.finish_reason,
            stop_reason=None if drop else choice.stop_reason,
        )

    def _shows(self, growth: Growth) -> bool:
        tells_tokens = self.request.return_token_ids or self.request.told_logprobs is not None
        return bool(growth.text or growth.finish_reason or (tells_tokens and growth.token_ids))


def text_of(token: int, entry: Logprob) -> str:
    """A token's own text; its id where there is no tokenizer."""
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _length(token_ids: Iterable[int], logprobs: Iterable[Logprobs]) -> int:
    """Characters of tokens whose log-probabilities are known."""
    return sum(len(text_of(token, known[token])) for token, known in zip(token_ids, logprobs, strict=False))


def finite(entry: Logprob) -> float:
    return max(entry.logprob, LEAST_LOGPROB)
