"""OpenAI's completions: which fields a request may have, and what an answer looks like.

Every field is honoured, or refused with an error that names it. Knows nothing of HTTP or the engine.
"""

from __future__ import annotations

import json
import reprlib
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from lamina_jax.core import RequestOutput, SamplingParams
from lamina_jax.server.messages import Prompt

MAX_PROMPTS = 1024

NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "seed": (),
    "stop": ([],),
    "suffix": (),
    "temperature": (0,),
    "top_k": (-1, 0),
    "top_p": (1,),
}
"""Fields that ask for what is not built yet, and the values that ask for nothing; null always does."""


def _prompts(value: object) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]  # type: ignore[list-item]
    if not isinstance(value, list) or not (
        all(isinstance(item, str) for item in value) or all(_is_token_ids(item) for item in value)
    ):
        raise PydanticCustomError(
            "prompt_type", "expected a string, a list of strings, a list of token ids or a list of such lists"
        )
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("prompt_type", f"expected at most {MAX_PROMPTS} prompts")
    return value


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class StreamOptions(BaseModel):
    """Of a streamed answer: whether a last chunk tells the usage."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`, with three fields that OpenAI's does not have.

    `stop_token_ids` and `ignore_eos` are those of `SamplingParams`; with `return_token_ids` a choice
    says its `token_ids` too (in a stream, those of the chunk). `user` is accepted and means nothing here.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in NOT_SUPPORTED:
            if name in body and not _asks_for_nothing(name, body[name]):
                raise _not_supported(name, body[name])
        if body.get("stream_options") is not None and body.get("stream") is not True:
            raise PydanticCustomError(
                "not_supported", "stream_options is only for stream=true", {"param": "stream_options"}
            )
        return {name: value for name, value in body.items() if name not in NOT_SUPPORTED}

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _asks_for_nothing(name: str, value: object) -> bool:
    # True == 1 in Python, but a flag where a number belongs is a mistake.
    return value is None or any(
        value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
        for harmless in NOT_SUPPORTED[name]
    )


def _not_supported(name: str, value: object) -> PydanticCustomError:
    harmless = " or ".join(json.dumps(choice) for choice in NOT_SUPPORTED[name]) or "null"
    return PydanticCustomError(
        "not_supported",
        "{param}={value} is not supported yet: leave it out or send {harmless}",
        {"param": name, "value": reprlib.repr(value), "harmless": harmless},
    )


@dataclass
class Answer:
    """Writes the answer to one request, whole or in chunks, from the outputs of its prompts.

    Outputs are whole continuations so far; a chunk says what is new in them.
    """

    call_id: str
    request: CompletionRequest
    created: int = field(default_factory=lambda: int(time.time()))
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    def take(self, index: int, output: RequestOutput) -> None:
        """The continuation of prompt `index` as it is now."""
        self.outputs[index] = output

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [self._choice(index, output, None) for index, output in sorted(self.outputs.items())]
        return self._body(choices) | {"usage": self.usage()}

    def chunk(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """What is new of prompt `index`; None where there is nothing to see."""
        choice = self._choice(index, output, self.outputs.get(index))
        self.take(index, output)
        if not (choice["text"] or choice["finish_reason"] or choice.get("token_ids")):
            return None
        return self._body([choice]) | ({"usage": None} if self.request.include_usage else {})

    def last_chunk(self) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._body([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(output.prompt_token_ids) for output in self.outputs.values())
        completion = sum(len(output.outputs[0].token_ids) for output in self.outputs.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _choice(self, index: int, output: RequestOutput, seen: RequestOutput | None) -> dict[str, Any]:
        now = output.outputs[0]
        text_from, ids_from = (len(seen.outputs[0].text), len(seen.outputs[0].token_ids)) if seen else (0, 0)
        choice = {
            "index": index,
            "text": now.text[text_from:],
            "logprobs": None,
            "finish_reason": now.finish_reason,
        }
        return choice | ({"token_ids": now.token_ids[ids_from:]} if self.request.return_token_ids else {})

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.call_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
