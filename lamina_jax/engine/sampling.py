"""From logits to tokens: edits, sampling and log-probabilities as pure functions of arrays.

R = max(B, 4) rows, those beyond B padding. Nothing sorts the vocabulary: a row is looked at in blocks.
Whatever the logits hold, NaN and infinities included, a chosen id lies in the vocabulary. It knows
nothing of requests, of steps or of which function is called when.
"""

from __future__ import annotations

from typing import NamedTuple

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


def greedy(logits: Float[Array, "R V"], *, size: int) -> Int[Array, "{size}"]:
    """The best token of each row, of equals the lowest id; zeros behind them."""
    # XLA on a CPU takes ten times as long over one argmax of the whole row.
    blocks = in_blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1).astype(jnp.int32)
    return _in_front(block * BLOCK + jnp.argmax(_take_block(blocks, block), axis=-1).astype(jnp.int32), size)


def sample(
    logits: Float[Array, "R V"],
    temperature: Float[Array, "R"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    min_p: Float[Array, "R"],
    uniform: Float[Array, "R"],
    *,
    size: int,
) -> Int[Array, "{size}"]:
    """A token per row by its `uniform` in [0, 1): the inverse of the distribution function, in order of id.

    What is left of the distribution: top-k keeps the k most probable tokens and those that tie with the
    last of them; top-p the fewest most probable tokens of what that leaves whose probabilities reach p in
    sum, and those that tie with the last of them; min-p those at least min_p times as probable as the best.
    A row of temperature 0 takes its best token, of equals the lowest id. Zeros stand behind the rows.
    """
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
    return _in_front(block * BLOCK + place, size)


def edit_logits(
    logits: Float[Array, "R V"],
    fed: Int[Array, "R"],
    history: Int[Array, "R U"],
    presence: Float[Array, "R"],
    frequency: Float[Array, "R"],
    repetition: Float[Array, "R"],
    bias_ids: Int[Array, "R E"],
    bias: Float[Array, "R E"],
) -> Float[Array, "R V"]:
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


def logprobs(logits: Float[Array, "R V"], tokens: Int[Array, "n"]) -> Logprobs:
    """Log-probabilities of the first R tokens (n >= R), their ranks, and the best `MAX_LOGPROBS` ids.

    Ranks count from 1; tokens that tie have the same. A token below 0 stands for none: what its row
    says of it means nothing.
    """
    logits = _clean(logits)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens[: logits.shape[0], None], 0), axis=1)
    best = _best(logits)
    total = best + jnp.log(jnp.exp(logits - best).sum(axis=1, keepdims=True))
    ranks = 1 + (logits > chosen).astype(jnp.float32).sum(axis=1)  # a sum of floats is the faster one
    top, ids = largest(in_blocks(logits, -jnp.inf), MAX_LOGPROBS)
    ids = jnp.minimum(ids, logits.shape[1] - 1).astype(jnp.int32)
    return Logprobs((chosen - total)[:, 0], ranks.astype(jnp.int32), ids, top - total)


def _weights(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """f32[R, V]: probabilities as shares of the best one's; at temperature 0, 1 for the best and 0 else."""
    logits = _clean(logits)
    return jnp.exp((logits - _best(logits)) * (1 / jnp.maximum(temperature, 1e-30))[:, None])


def _clean(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _HUGE))


def _best(logits: jax.Array) -> jax.Array:
    """f32[R, 1]: the largest logit, finite even where every token is banned."""
    return jnp.maximum(logits.max(axis=1, keepdims=True), -_HUGE)


def _crossing(parts: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32[R]: where the running sum of parts [R, n] passes the target; and what of it is left there.

    Parts that are not negative; one that is 0 is passed over, whatever rounding does.
    """
    ends = jnp.cumsum(parts, axis=1)
    place = (ends <= jnp.maximum(target, 0.0)[:, None]).sum(axis=1, dtype=jnp.int32)
    ids = lax.broadcasted_iota(jnp.int32, parts.shape, 1)
    place = jnp.minimum(place, jnp.where(parts > 0, ids, 0).max(axis=1))
    before = jnp.take_along_axis(ends - parts, place[:, None], axis=1)[:, 0]
    return place, target - before


def _take_block(blocks: jax.Array, block: jax.Array) -> jax.Array:
    """f32[R, BLOCK]: one block of each row."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _in_front(tokens: jax.Array, size: int) -> jax.Array:
    return jnp.zeros(size, jnp.int32).at[: tokens.shape[0]].set(tokens)
