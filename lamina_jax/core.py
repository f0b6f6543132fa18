"""The plain messages of the system: requests, step plans and outputs.

Nothing here knows of jax, of devices or of HTTP: the engine, the scheduler, the simulator and the
server exchange these objects, and they can cross a process boundary as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the continuation of one prompt is chosen. Decoding is greedy: `temperature` must be 0.

    Args:
        max_tokens: at most so many tokens are generated (at least 1).
        temperature: 0 is greedy; any other value is refused until sampling is supported.
        stop_token_ids: generation ends when one of these is chosen, beside the model's own end ids.
        ignore_eos: the model's own end ids do not end the generation.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int):
            raise TypeError(f"max_tokens must be an int, got {self.max_tokens!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature != 0:
            raise ValueError(
                f"temperature={self.temperature} is not supported yet: decoding is greedy, use temperature=0"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise TypeError(f"stop_token_ids must be non-negative ints, got {token!r}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued.

    Args:
        request_id: unique among the requests that the engine holds.
        prompt_token_ids: the prompt, at least one token.
        sampling: how to continue it.
        stop_token_ids: every token id that ends this request (the model's own end ids included,
            unless `sampling.ignore_eos`); filled in by the engine.
        prompt: the text that the ids come from, if they come from text.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """What one microbatch does in one step. All arrays are numpy, their shapes static per bucket.

    A microbatch is B rows of Q new tokens; T = B * Q. Row b belongs to `request_ids[b]`; rows beyond
    `len(request_ids)` are padding, as are the last tokens of a row whose prompt is shorter than Q.
    M is the width of a block table (pages of the longest request), p the page size.

    Attributes:
        microbatch: decode microbatches are 0 .. n-1; a prefill microbatch is n.
        kind: "decode" (Q = 1, merges a cached part) or "prefill" (no cached part).
        request_ids: the request of each live row.
        tokens: int32[B, Q]: new tokens, as far as the host knows them.
        feedback: int32[B]: the row of this microbatch's previous step whose sampled token is this
            row's new token, still on the device; -1: take `tokens`.
        positions: int32[B, Q]: position of each new token in its request.
        context_lens: int32[B]: cached tokens of the request before this step.
        block_tables: int32[B, M]: page ids in order; unused places hold 0 and are never read.
        page_index: int32[B, M]: the place of each of those pages in its request: 0, 1, 2, ... M - 1 where
            one worker holds the whole request. It increases along a row; a place that holds no page lies
            at or beyond the context.
        slots: int32[B, Q]: page * p + offset where each new token's k and v are kept; padding holds
            num_pages * p, which is out of range and dropped.
        logits_at: int32[B]: index into T of the token whose logits choose the row's next token.
    """

    microbatch: int
    kind: Literal["prefill", "decode"]
    request_ids: tuple[str, ...]
    tokens: np.ndarray
    feedback: np.ndarray
    positions: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    page_index: np.ndarray
    slots: np.ndarray
    logits_at: np.ndarray

    @property
    def bucket(self) -> tuple[int, int]:
        """(B, Q)."""
        return self.tokens.shape[0], self.tokens.shape[1]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: its microbatches in the order of the rotation. `step` counts from 0."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...]


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """The scheduler's word on one request after a step: the token it got, and whether it ended."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None


@dataclass(kw_only=True)
class CompletionOutput:
    """One continuation of a prompt. `finish_reason` is None while it is being generated.

    `stop_reason` is the token id that ended it, where one of `stop_token_ids` did.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A prompt and its continuations so far (in vLLM's shape)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
