"""From logits to tokens: edits, sampling and log-probabilities as pure functions of arrays.

A microbatch is padded to at least 4 rows. Nothing sorts the vocabulary: a row is looked at in blocks.
Whatever the logits hold, NaN and infinities included, a chosen id lies in the vocabulary. It knows
nothing of requests, of steps or of which function is called when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lamina_jax.core import MAX_LOGPROBS
from lamina_jax.engine.truncation import BLOCK, in_blocks, largest, thresholds

_HUGE = float(np.finfo(np.float32).max)


class Logprobs(NamedTuple):
    """`core.TokenLogprobs` on the device."""

    chosen: jax.Array
    ranks: jax.Array
    top_ids: jax.Array
    top: jax.Array


def greedy(logits: Float[Array, "B V"], *, size: int) -> Int[Array, "..."]:
    """int32[size]: the best token of each row, of equals the lowest id; zeros behind them."""
    # XLA on a CPU takes ten times as long over one argmax of the whole row.
    blocks = in_blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1).astype(jnp.int32)
    return _in_front(block * BLOCK + jnp.argmax(_take_block(blocks, block), axis=-1).astype(jnp.int32), size)


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    min_p: Float[Array, "B"],
    uniform: Float[Array, "B"],
    *,
    size: int,
    group: int | None = None,
) -> Int[Array, "..."]:
    """int32[size]: a token per row by its `uniform` in [0, 1), the inverse of the distribution over the ids.

    What is left of the distribution: top-k keeps the k most probable tokens and those that tie with the
    last of them; top-p the fewest most probable tokens of what that leaves whose probabilities reach p in
    sum, and those that tie with the last of them; min-p those at least min_p times as probable as the best.
    A row of temperature 0 takes its best token, of equals the lowest id. Zeros stand behind the rows.

    Args:
        group: rows worked on at once, a divisor of B; None: all.
    """
    rows = (logits, temperature, top_k, top_p, min_p, uniform)
    return _in_front(_in_groups(_sample, group, *rows), size)


def _sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    uniform: jax.Array,
) -> jax.Array:
    weights = in_blocks(_weights(logits, temperature), 0.0)
    random = temperature > 0
    top_k = jnp.where(random & (top_k < logits.shape[1]), top_k, 0)
    top_p = jnp.where(random, top_p, 1.0)
    least = lax.cond(
        ((top_k > 0) | (top_p < 1)).any(),
        lambda: thresholds(weights, top_k, top_p),
        lambda: jnp.zeros_like(top_p),
    )
    least = jnp.maximum(least, min_p)[:, None]
    sums = jnp.where(weights >= least[:, :, None], weights, 0.0).sum(axis=-1)
    block, target = _crossing(sums, jnp.where(random, uniform, 0.0) * sums.sum(axis=1))
    inside = _take_block(weights, block)
    place, _ = _crossing(jnp.where(inside >= least, inside, 0.0), target)
    return block * BLOCK + place


def edit_logits(
    logits: Float[Array, "B V"],
    fed: Int[Array, "B"],
    history: Int[Array, "B U"],
    presence: Float[Array, "B"],
    frequency: Float[Array, "B"],
    repetition: Float[Array, "B"],
    bias_ids: Int[Array, "B E"],
    bias: Float[Array, "B E"],
) -> Float[Array, "B V"]:
    """Logits after the penalties and the bias of `core.LogitEdits`.

    Args:
        fed: this step's own input token, which was generated and is not in `history`; -1: none.
    """
    vocab = logits.shape[1]
    fed = jnp.where(fed >= 0, fed + vocab, -1)
    tokens = jnp.concatenate([history, fed[:, None]], axis=1)
    # An id of V is out of range: reading gives 0 there, writing is dropped.
    seen = jnp.where(tokens >= 0, tokens % vocab, vocab)
    generated = jnp.where(tokens >= vocab, seen, vocab)
    row = jnp.arange(logits.shape[0])[:, None]

    # A token that occurs twice is written twice with the same value, but is counted twice by `add`.
    old = logits.at[row, seen].get(mode="fill", fill_value=0.0)
    repetition = repetition[:, None]
    logits = logits.at[row, seen].set(jnp.where(old > 0, old / repetition, old * repetition), mode="drop")
    old = logits.at[row, generated].get(mode="fill", fill_value=0.0)
    logits = logits.at[row, generated].set(old - presence[:, None], mode="drop")
    less = jnp.broadcast_to(frequency[:, None], generated.shape)
    logits = logits.at[row, generated].add(-less, mode="drop")
    return logits.at[row, bias_ids].add(bias, mode="drop")


def logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "T"], *, group: int | None = None) -> Logprobs:
    """Log-probabilities of the first B tokens (T >= B), their ranks, and the best `MAX_LOGPROBS` ids.

    Ranks count from 1; tokens that tie have the same. A token below 0 stands for none: what its row
    says of it means nothing.

    Args:
        group: rows worked on at once, a divisor of B; None: all.
    """
    return _in_groups(_logprobs, group, logits, tokens[: logits.shape[0]])


def _logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    logits = _clean(logits)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens[:, None], 0), axis=1)
    best = _best(logits)
    total = best + jnp.log(jnp.exp(logits - best).sum(axis=1, keepdims=True))
    ranks = 1 + (logits > chosen).astype(jnp.float32).sum(axis=1)  # a sum of floats is the faster one
    top, ids = largest(in_blocks(logits, -jnp.inf), MAX_LOGPROBS)
    ids = jnp.minimum(ids, logits.shape[1] - 1).astype(jnp.int32)
    return Logprobs((chosen - total)[:, 0], ranks.astype(jnp.int32), ids, top - total)


def _in_groups(function: Callable[..., Any], group: int | None, *rows: jax.Array) -> Any:
    """`function` of all rows, or of so many at a time."""
    size = rows[0].shape[0]
    if group is None or group == size:
        return function(*rows)
    groups = [x.reshape(size // group, group, *x.shape[1:]) for x in rows]
    results = lax.map(lambda some: function(*some), groups)
    return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), results)


def _weights(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """f32[B, V]: probabilities as shares of the best one's; at temperature 0, 1 for the best and 0 else."""
    logits = _clean(logits)
    return jnp.exp((logits - _best(logits)) * (1 / jnp.maximum(temperature, 1e-30))[:, None])


def _clean(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _HUGE))


def _best(logits: jax.Array) -> jax.Array:
    """f32[B, 1]: the largest logit, finite even where every token is banned."""
    return jnp.maximum(logits.max(axis=1, keepdims=True), -_HUGE)


def _crossing(parts: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32[B]: where the running sum of parts [B, n] passes the target; and what of it is left there.

    Parts that are not negative; one that is 0 is passed over, whatever rounding does.
    """
    ends = jnp.cumsum(parts, axis=1)
    place = (ends <= jnp.maximum(target, 0.0)[:, None]).sum(axis=1, dtype=jnp.int32)
    ids = lax.broadcasted_iota(jnp.int32, parts.shape, 1)
    place = jnp.minimum(place, jnp.where(parts > 0, ids, 0).max(axis=1))
    before = jnp.take_along_axis(ends - parts, place[:, None], axis=1)[:, 0]
    return place, target - before


def _take_block(blocks: jax.Array, block: jax.Array) -> jax.Array:
    """f32[B, BLOCK]: one block of each row."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _in_front(tokens: jax.Array, size: int) -> jax.Array:
    return jnp.zeros(size, jnp.int32).at[: tokens.shape[0]].set(tokens)
