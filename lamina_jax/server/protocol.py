"""The bodies of OpenAI's two endpoints: which fields a request may have, and what they ask of the engine.

Every field is honoured, or refused with an error that names it; the descriptions of the fields and the tables
of what is refused are also what docs/api.md is made from. Fields that are called like those of
`SamplingParams` go there as they are, and only there are their ranges known. Knows nothing of HTTP or the
engine; answers are written elsewhere.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lamina_jax.core import MAX_LOGIT_BIAS, SamplingParams
from lamina_jax.server.errors import printable
from lamina_jax.server.prompts import TextOrIds
from lamina_jax.server.refused_fields import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    Refused,
    check_refused,
    refusal,
)

MAX_CHOICES = 1024
MAX_STOP = 64
MAX_STOP_TOKEN_IDS = 1024


def _unicode(text: str) -> str:
    text.encode()  # JSON can hold half of a surrogate pair, which is no text
    return text


Stop = Annotated[
    list[Annotated[str, AfterValidator(_unicode)]],
    Field(max_length=MAX_STOP),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, str | list[str]),
]


def _few_biases(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise refusal(None, f"logit_bias has {len(value)} entries, at most {MAX_LOGIT_BIAS} are taken")
    return value


LogitBias = Annotated[dict[Annotated[int, Field(strict=False)], float], BeforeValidator(_few_biases)]


class _Body(BaseModel):
    """What is wrong is told of one place alone: a body has room for millions of errors."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        for name in body if isinstance(body, dict) else ():
            if name not in cls.model_fields:
                raise refusal(printable(name), f"unknown field {name!r}: leave it out")
        return body


class StreamOptions(_Body):
    """Of a streamed answer: where it tells the usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(_Body):
    """What both endpoints take."""

    REFUSED: ClassVar[Refused]
    ID_PREFIX: ClassVar[str]
    PROMPT: ClassVar[str]
    """The field that holds the prompt."""

    model: str
    """the name under which the model is served"""
    n: int | None = None
    """choices of each prompt, 1 .. 128; at most 1,024 choices in all"""
    max_tokens: int | None = None
    """default 16; 0 generates nothing, which with `echo` tells about the prompt"""
    min_tokens: int | None = None
    """so many before an end id or a stop string ends the text"""
    temperature: float | None = None
    """default 1; 0 is greedy"""
    top_p: float | None = None
    """above 0, at most 1"""
    top_k: int | None = None
    """0 or -1: all"""
    min_p: float | None = None
    """as a share of the most probable token's probability, 0 .. 1"""
    seed: int | None = None
    """the same tokens again, in any batch (in bfloat16: within one batch size)"""
    presence_penalty: float | None = None
    """-2 .. 2"""
    frequency_penalty: float | None = None
    """-2 .. 2"""
    repetition_penalty: float | None = None
    """of the prompt's tokens too; above 0, 1 does nothing"""
    logit_bias: LogitBias | None = None
    """at most 300 token ids, -100 .. 100"""
    stop: Stop | None = None
    """at most 64; not part of the text"""
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """at most 1,024; beside the model's own end ids"""
    ignore_eos: bool | None = None
    """the model's own end ids do not end the text"""
    prompt_logprobs: int | None = None
    """0 .. 20; each choice says its `prompt_logprobs`: null for the first token, then id to `{logprob, rank,
    decoded_token}`"""
    add_special_tokens: bool | None = None
    """whether the tokenizer puts its own around a text; default true, in a chat false"""
    return_token_ids: bool | None = None
    """a choice says its `token_ids`; in a stream, those of the chunk"""
    stream: bool | None = None
    """server-sent events, the last of them `[DONE]`"""
    stream_options: StreamOptions | None = None
    """`include_usage`: a last chunk tells it; `continuous_usage_stats`: every chunk does"""
    user: str | None = None
    """accepted, and means nothing here"""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        check_refused(body, cls.REFUSED)
        if body.get("stream_options") is not None and body.get("stream") is not True:
            raise refusal("stream_options", "stream_options is only for stream=true")
        return {name: value for name, value in body.items() if name not in cls.REFUSED}

    def sampling(self, context_length: int) -> SamplingParams:
        """What the engine is asked to do, for a model with contexts of so many tokens.

        Raises:
            TypeError, ValueError: a value that cannot be obeyed; the message begins with its field.
        """
        asked = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        asked |= {"logprobs": self.told_logprobs, **self._in_other_words(context_length)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in asked.items()
            if value is not None
        }
        return SamplingParams(**given)

    def param_of(self, message: str) -> str:
        """The field that an error speaks of, which it begins with; else the prompt is at fault."""
        found = re.match(r"([a-z_]+)(\[\d+\]|\.[a-z_]+)*", message)
        return found[0] if found and found[1] in type(self).model_fields else self.PROMPT

    @property
    @abstractmethod
    def told_logprobs(self) -> int | None:
        """How many alternatives are told beside each token; None where nothing is told."""

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer puts its own around a text."""
        default = self.PROMPT == "prompt"  # a chat template writes them itself
        return default if self.add_special_tokens is None else self.add_special_tokens

    @abstractmethod
    def _in_other_words(self, context_length: int) -> dict[str, Any]:
        """Values of `SamplingParams` that this endpoint says in its own way."""


def _prompts(value: object) -> list[TextOrIds]:
    """One prompt or several, as a list."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]  # type: ignore[list-item]
    if not isinstance(value, list) or not (
        all(isinstance(item, str) for item in value) or all(_is_token_ids(item) for item in value)
    ):
        raise PydanticCustomError(
            "prompt_type", "expected a string, a list of strings, a list of token ids or a list of such lists"
        )
    return value


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


Prompts = Annotated[
    list[TextOrIds],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    REFUSED = REFUSED_IN_COMPLETIONS
    ID_PREFIX = "cmpl"
    PROMPT = "prompt"

    prompt: Prompts
    """a text, token ids, or a list of either"""
    best_of: int | None = None
    """only as many as `n`"""
    echo: bool | None = None
    """the text begins with the prompt; with `logprobs` the prompt's are told, the first of them null"""
    logprobs: int | None = None
    """0 .. 20 alternatives beside each token"""

    @model_validator(mode="after")
    def _count(self) -> CompletionRequest:
        n = self.n or 1
        if self.best_of not in (None, n):
            raise refusal(
                "best_of", f"best_of={self.best_of} is not supported: leave it out or send {n}, as n"
            )
        if len(self.prompt) * n > MAX_CHOICES:
            name = "prompt" if len(self.prompt) > MAX_CHOICES else "n"
            raise refusal(
                name,
                f"{len(self.prompt)} prompts with n={n} make more than {MAX_CHOICES} choices: send fewer",
            )
        return self

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    def _in_other_words(self, context_length: int) -> dict[str, Any]:
        words: dict[str, Any] = {"max_tokens": 1} if self.max_tokens == 0 else {}
        if self.echo and self.prompt_logprobs is None:
            words["prompt_logprobs"] = self.logprobs
        return words


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    REFUSED = REFUSED_IN_CHAT
    ID_PREFIX = "chatcmpl"
    PROMPT = "messages"

    messages: Annotated[list[dict[str, Any]], FailFast()]
    """roles as the chat template knows them; content is a string or a list of text parts, which are joined by
    line breaks"""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """the older name of `max_completion_tokens`"""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """default: what fits the model's context"""
    logprobs: bool | None = None
    """of the answer's tokens"""
    top_logprobs: int | None = None
    """0 .. 20 alternatives beside each token, with `logprobs` alone"""
    add_generation_prompt: bool | None = None
    """default true: the prompt ends with the beginning of an answer"""
    chat_template_kwargs: dict[str, Any] | None = None
    """more variables for the chat template"""
    safety_identifier: str | None = None
    """accepted, and means nothing here"""

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only for logprobs=true")
        if self.max_completion_tokens not in (None, self.max_tokens or self.max_completion_tokens):
            raise refusal("max_tokens", "max_tokens and max_completion_tokens differ: send one of them")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def _in_other_words(self, context_length: int) -> dict[str, Any]:
        return {"max_tokens": self.max_completion_tokens or self.max_tokens or context_length}
