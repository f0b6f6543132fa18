"""The plain messages of the system: requests, step plans and outputs.

Nothing here knows of jax, of devices or of HTTP: the engine, the scheduler, the simulator and the
server exchange these objects, and they can cross a process boundary as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]


class WorkerLost(RuntimeError):
    """An attention worker does not answer any more, and what it held is gone.

    Attributes:
        worker: its address.
        reason: what was seen of it.
    """

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"attention worker {worker} is lost: {reason}")
        self.worker, self.reason = worker, reason


class QueueFull(RuntimeError):
    """So many requests wait that no more are taken; the message says how many, and what to do."""


MAX_LOGPROBS = 20
"""Most alternatives that are told beside a token."""

MOST_INTEGER = 2**63 - 1
"""Of a setting without a bound of its own: what fits a message."""

MAX_LOGIT_BIAS = 300
"""Most entries of `SamplingParams.logit_bias`."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the continuations of one prompt are chosen (vLLM's names and defaults).

    The order is: penalties, bias, temperature, then top-k, top-p and min-p among what is left.

    Args:
        n: continuations of the prompt.
        max_tokens: at most so many tokens are generated (at least 1).
        min_tokens: no end id and no stop string ends the generation before so many.
        temperature: 0 is greedy.
        top_k: the most probable k tokens; 0 or -1 takes all.
        top_p: the most probable tokens whose probabilities reach p in sum; in (0, 1].
        min_p: tokens at least so probable as a share of the most probable one; in [0, 1].
        seed: the same seed gives the same tokens in any batch; None draws one.
        presence_penalty, frequency_penalty: subtracted from the logit of each generated token, once, or
            as often as it occurred; in [-2, 2].
        repetition_penalty: divides the positive logits of tokens in prompt and continuation, and
            multiplies their negative ones; 1 does nothing.
        logit_bias: added to the logits of these token ids; in [-100, 100], at most `MAX_LOGIT_BIAS`.
        logprobs: tell each token's log-probability under the model and that many alternatives
            (0 .. `MAX_LOGPROBS`), before penalties, bias and temperature; None tells nothing.
        prompt_logprobs: the same for each prompt token but the first.
        stop: strings that end the generation, and are not part of its text.
        stop_token_ids: generation ends when one of these is chosen, beside the model's own end ids.
        ignore_eos: the model's own end ids do not end the generation.

    Raises:
        TypeError, ValueError: a value that cannot be obeyed, by its name.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, 128)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, -1)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p must be above 0: use temperature=0 for greedy decoding")
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 100)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be above 0")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIAS} are taken"
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token", token, 0)
            _number("logit_bias", bias, -100, 100)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise TypeError(f"stop must be non-empty strings, got {text!r}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    @property
    def greedy(self) -> bool:
        """Whether nothing but the best logit decides."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether a token is the best logit, and nothing else is wanted of it."""
        return self.greedy and not self.edits_logits and self.logprobs is None

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.logit_bias) or self.min_tokens > 0 or self.penalised

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens weigh on the next."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def _integer(name: str, value: object, least: int, most: int = MOST_INTEGER) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value <= most:
        bounds = f"at least {least}" if most == MOST_INTEGER > value else f"in {least} .. {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value <= most:  # also refuses NaN
        raise ValueError(f"{name} must be in {least} .. {most}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation of one prompt.

    Args:
        request_id: unique among the requests that the engine holds.
        prompt_token_ids: the prompt, at least one token.
        sampling: how to continue it.
        stop_token_ids: every token id that ends this request (the model's own end ids included,
            unless `sampling.ignore_eos`); filled in by the engine.
        seed: 64 bits: `sampling.seed`, or one that the engine has drawn.
        choice: which of the prompt's `sampling.n` continuations this is; it takes part in the seed.
        prompt: the text that the ids come from, if they come from text.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    choice: int = 0
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class LogitEdits:
    """What changes the logits of rows before a token is chosen. U is the longest history.

    Attributes:
        history: int32[B, U]: the tokens so far but for this step's own input: prompt tokens as their
            id, generated ones as id + V, -1 behind them. Empty rows where nothing is penalised.
        presence, frequency, repetition: float32[B]: the penalties.
        bias_ids: int32[B, E]: token ids, V (no token) behind them. E = `MAX_LOGIT_BIAS` + 20.
        bias: float32[B, E]: added to their logits; -inf bans a token.
    """

    history: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    repetition: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """What the sampler is told of each row of a microbatch; padding rows are greedy.

    Attributes:
        temperature, top_p, min_p: float32[B].
        top_k: int32[B], 0: all.
        uniform: float32[B] in [0, 1): one number per (seed, choice, index of the token).
        edits: where some row edits its logits.
        logprobs: whether some row is to be told log-probabilities.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray
    edits: LogitEdits | None = None
    logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities under the model of R tokens, and of the best ones in their places.

    Attributes:
        chosen: float32[R]; ranks: int32[R], 1 is the best.
        top_ids: int32[R, `MAX_LOGPROBS`]; top: float32[R, `MAX_LOGPROBS`], best first.
    """

    chosen: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What came of one microbatch in one step.

    Attributes:
        tokens: int32[B], of rows whose plan asks for a token.
        logprobs: of those tokens (R = B), where the plan's `sampling` asks for them.
        prompt_logprobs: of the T prompt tokens that follow the step's tokens (R = T), where the plan's
            `prompt_targets` asks for them.
    """

    tokens: np.ndarray
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """What one microbatch does in one step. All arrays are numpy, their shapes static per bucket.

    A microbatch is B rows of Q new tokens; T = B * Q. Row b belongs to `request_ids[b]`; rows where it is
    "", and rows beyond `len(request_ids)`, are padding, as are the last tokens of a row whose prompt is
    shorter than Q.
    M is the width of a block table (pages of the longest request), p the page size.

    Attributes:
        microbatch: decode microbatches are 0 .. n-1; a prefill microbatch is n.
        kind: "decode" (Q = 1) or "prefill" (chunks of prompts).
        cached: whether some row has cached tokens, so that there is a cached part to merge.
        request_ids: the request of each row, "" for a padding row between live ones.
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
            the number of all slots, which is out of range and dropped.
        logits_at: int32[B]: index into T of the token whose logits choose the row's next token.
        samples: bool[B]: the rows that get a new token: those whose prompt ends here.
        sampling: how, where some row is not greedy or wants more than its token; None: all greedy.
        prompt_targets: int32[T]: the prompt token that follows each new token, where some row is to be
            told the log-probabilities of its prompt; -1 where there is none.
        worker: where the cache is partitioned by request: the worker that holds all rows; None: the rows
            are W equal segments, one of each worker.
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
    cached: bool
    samples: np.ndarray
    sampling: SamplingRows | None = None
    prompt_targets: np.ndarray | None = None
    worker: int | None = None

    @property
    def bucket(self) -> tuple[int, int]:
        """(B, Q)."""
        return self.tokens.shape[0], self.tokens.shape[1]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: its microbatches in the order of the rotation. `step` counts from 0."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...]


class TokenEvent(NamedTuple):
    """The scheduler's word on one request after a step: the token it got, and whether it ended.

    `token_id` is None for a chunk of a prompt that does not end it. `microbatch` and `row` say where in
    the step's plan the request is.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    microbatch: int = 0
    row: int = 0


class Logprob(NamedTuple):
    """One token's log-probability under the model, and its rank (1 is the best)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]
"""By token id: the token itself, and the best ones."""


@dataclass(kw_only=True)
class CompletionOutput:
    """One continuation of a prompt, or what is new of it. `finish_reason` is None while it is generated.

    `stop_reason` is the token id or the string that ended it, where one of `stop_token_ids` or `stop` did.
    `logprobs` holds one entry per token where they were asked for.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] | None = None

    def extend(self, new: CompletionOutput) -> None:
        """Add what came after this."""
        self.text += new.text
        self.token_ids += new.token_ids
        if new.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += new.logprobs
        self.finish_reason, self.stop_reason = new.finish_reason, new.stop_reason


@dataclass(kw_only=True)
class RequestOutput:
    """A prompt and its continuations in the order of their index (in vLLM's shape).

    `LLM.generate` returns whole ones. A step of the engine yields what is new: only those continuations that
    have grown, each with what was added, and no prompt; `extend` puts them together.

    `prompt_logprobs` holds one entry per prompt token where they were asked for; the first is None.
    `error` says why continuations ended with the finish reason "error": the request can be sent again.
    `queue_seconds` is the time from `submit` until the first of them was admitted.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[Logprobs | None] | None = None
    error: str | None = None
    queue_seconds: float | None = None

    def extend(self, new: RequestOutput) -> None:
        """Add what came after this; its parts may be kept, so nobody else may change them afterwards."""
        known = {choice.index: choice for choice in self.outputs}
        for choice in new.outputs:
            if choice.index in known:
                known[choice.index].extend(choice)
            else:
                self.outputs.append(choice)
        self.outputs.sort(key=lambda choice: choice.index)
        if new.prompt_logprobs is not None:
            self.prompt_logprobs = self.prompt_logprobs or []
            self.prompt_logprobs += new.prompt_logprobs
        if new.queue_seconds is not None:
            self.queue_seconds = new.queue_seconds
        self.finished, self.error = new.finished, new.error
