"""What the sampler is told of each row, as arrays. No jax here.

It owns the random numbers, the layout of `SamplingRows` and when an end id is banned. It knows nothing
of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lamina_jax.core import MAX_LOGIT_BIAS, LogitEdits, Request, SamplingParams, SamplingRows

MAX_BIASED = MAX_LOGIT_BIAS + 20
"""Most token ids of a row that are biased or banned."""

SHORTEST_HISTORY = 512

_UNIFORMS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of a microbatch that gets a token.

    Attributes:
        request: whose row it is.
        index: which of the generated tokens it is about to get, from 0.
        generated: the tokens generated so far but for this step's own input.
    """

    request: Request
    index: int
    generated: Sequence[int] = ()

    @property
    def banned(self) -> frozenset[int]:
        """The ids that may not be chosen yet."""
        early = self.index < self.request.sampling.min_tokens
        return self.request.stop_token_ids if early else frozenset()

    @property
    def edited(self) -> bool:
        """Whether this row's logits are changed now."""
        sampling = self.request.sampling
        return sampling.penalised or bool(sampling.logit_bias) or bool(self.banned)


# Padding between live rows: greedy, and nothing else wanted of it.
_PADDING = SampledRow(Request(request_id="", prompt_token_ids=(), sampling=SamplingParams(temperature=0)), 0)


def sampling_rows(
    rows: Sequence[SampledRow | None], size: int, *, vocab_size: int, history: int
) -> SamplingRows | None:
    """The arrays that the sampler reads for a microbatch.

    Args:
        rows: the live rows, row 0 first; None for a padding row between them.
        size: B, padding included.
        vocab_size: V.
        history: most tokens that a request can have; U is the smallest of `history_sizes` that does.

    Returns:
        None where every row takes its best token and is told nothing else.
    """
    sampled = [row or _PADDING for row in rows]
    params = [row.request.sampling for row in sampled]
    edits = _edits(sampled, size, vocab_size, history) if any(row.edited for row in sampled) else None
    told = any(p.logprobs is not None for p in params)
    if edits is None and not told and all(p.greedy for p in params):
        return None
    top_k = [min(max(p.top_k, 0), vocab_size) for p in params]
    return SamplingRows(
        temperature=_column([p.temperature for p in params], size, 0, np.float32),
        top_k=_column(top_k, size, 0, np.int32),
        top_p=_column([p.top_p for p in params], size, 1, np.float32),
        min_p=_column([p.min_p for p in params], size, 0, np.float32),
        uniform=_column(
            [uniform(r.request.seed, r.request.choice, r.index) for r in sampled], size, 0, np.float32
        ),
        edits=edits,
        logprobs=told,
    )


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1), a multiple of 2^-24, that depends on these three alone."""
    block, place = divmod(index, _UNIFORMS_AT_ONCE)
    return _uniforms(seed, choice, block)[place]


def history_sizes(longest: int) -> tuple[int, ...]:
    """The widths U that a history may have: none, and powers of eight times `SHORTEST_HISTORY`."""
    sizes = [0, SHORTEST_HISTORY]
    while sizes[-1] < longest:
        sizes.append(8 * sizes[-1])
    return (*sizes[:-1], min(sizes[-1], max(longest, 1)))


def check_edits(request: Request) -> None:
    """Refuse a request that biases and bans more ids than the sampler's arrays hold.

    Raises:
        ValueError: `logit_bias` and the end ids that `min_tokens` bans are more than `MAX_BIASED`.
    """
    bias, banned = request.sampling.logit_bias, request.stop_token_ids if request.sampling.min_tokens else ()
    if len(bias) + len(banned) > MAX_BIASED:
        raise ValueError(
            f"logit_bias has {len(bias)} entries and min_tokens bans {len(banned)} end ids, together at most "
            f"{MAX_BIASED} are taken: shorten logit_bias or stop_token_ids"
        )


@lru_cache(maxsize=4096)
def _uniforms(seed: int, choice: int, block: int) -> list[float]:
    # Philox is counter-based: any block is made without those before it, and a block costs what one does.
    key = np.array([seed % 2**64, choice], np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, block, 0, 0], np.uint64))
    return ((philox.random_raw(_UNIFORMS_AT_ONCE) >> np.uint64(40)) * 2.0**-24).tolist()


def _column(values: Sequence[float], size: int, padding: float, dtype: type) -> np.ndarray:
    return np.array([*values, *[padding] * (size - len(values))], dtype)


def _edits(rows: Sequence[SampledRow], size: int, vocab_size: int, history: int) -> LogitEdits:
    params = [row.request.sampling for row in rows]
    lengths = [
        len(r.request.prompt_token_ids) + len(r.generated) if r.request.sampling.penalised else 0
        for r in rows
    ]
    width = next(u for u in history_sizes(history) if u >= max(lengths))
    tokens = np.full((size, width), -1, np.int32)
    bias_ids = np.full((size, MAX_BIASED), vocab_size, np.int32)
    bias = np.zeros((size, MAX_BIASED), np.float32)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt = len(row.request.prompt_token_ids)
        if length:
            tokens[place, :prompt] = row.request.prompt_token_ids
            tokens[place, prompt:length] = np.asarray(row.generated, np.int32) + vocab_size
        added = [*row.request.sampling.logit_bias.items(), *((token, -np.inf) for token in row.banned)]
        if added:
            bias_ids[place, : len(added)], bias[place, : len(added)] = zip(*added, strict=True)
    return LogitEdits(
        history=tokens,
        presence=_column([p.presence_penalty for p in params], size, 0, np.float32),
        frequency=_column([p.frequency_penalty for p in params], size, 0, np.float32),
        repetition=_column([p.repetition_penalty for p in params], size, 1, np.float32),
        bias_ids=bias_ids,
        bias=bias,
    )
