"""Top-k and top-p as a threshold on a row of weights, found without sorting the vocabulary.

A row is kept as blocks, so that its largest weights come from a few blocks alone. Where they do not
decide, a false-position search brackets the threshold to within that many weights. It knows nothing of
logits, requests or temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 128
"""Weights of a row that are first looked at together; rows are padded to a multiple of it."""

LARGEST = 64
"""Most weights that are sorted: top-k up to it and nearly every top-p of a trained model need no search."""

SECANTS = 16
"""Steps of false position before plain halving, which is sure to end."""

Unit = Callable[[jax.Array], jax.Array]
"""What each weight counts for: itself under top-p, 1 under top-k."""


def in_blocks(x: Float[Array, "B V"], padding: float) -> Float[Array, "B blocks block"]:
    """Rows cut into blocks, the last one padded."""
    rows, size = x.shape
    return jnp.pad(x, ((0, 0), (0, -size % BLOCK)), constant_values=padding).reshape(rows, -1, BLOCK)


def largest(blocks: Float[Array, "B blocks block"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The n <= BLOCK largest values of each row, in falling order, and their places in the row."""
    # The n largest lie in the n blocks with the largest maxima; in their order, ties go to the lowest id.
    _, chosen = lax.top_k(blocks.max(axis=-1), min(n, blocks.shape[1]))
    chosen = jnp.sort(chosen, axis=-1)
    values = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(blocks.shape[0], -1)
    top, place = lax.top_k(values, n)
    return top, jnp.take_along_axis(chosen, place // BLOCK, axis=1) * BLOCK + place % BLOCK


def thresholds(
    weights: Float[Array, "B blocks block"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B"]:
    """The least weight that each row keeps: top-k, then top-p among what that leaves.

    Weights that tie with the last one kept are kept too. `weights` are not negative and at most 1.

    Args:
        top_k: 0 keeps all.
        top_p: 1 keeps all.
    """
    best, _ = largest(weights, LARGEST)
    by_k = _reach(weights, best, jnp.ones_like, top_k.astype(jnp.float32), top_k > 0)
    left = _measure(weights, by_k, lambda w: w)
    return jnp.maximum(by_k, _reach(weights, best, lambda w: w, top_p * left, top_p < 1))


def _reach(
    weights: jax.Array, best: jax.Array, unit: Unit, target: jax.Array, active: jax.Array
) -> jax.Array:
    """f32[B]: the largest threshold that keeps `target` units or more; 0 in rows that are not active."""
    sums = jnp.cumsum(unit(best), axis=1)
    near = sums[:, -1] >= target
    threshold = _first_reaching(best, sums, target)
    far = active & ~near
    searched = lax.cond(
        far.any(),
        lambda: _search(weights, best, unit, target, far),
        lambda: threshold,
    )
    return jnp.where(active, jnp.where(near, threshold, searched), 0.0)


class _Bracket(NamedTuple):
    """Thresholds lo < hi as the bits of a float32, which have its order: `lo` reaches the target, `hi`
    does not. `*_sum` is what they keep; `*_odds` how far that is from the target, for false position.
    `rose`: the end that moved last is `lo`."""

    lo: jax.Array
    hi: jax.Array
    lo_sum: jax.Array
    hi_sum: jax.Array
    lo_odds: jax.Array
    hi_odds: jax.Array
    rose: jax.Array


def _search(
    weights: jax.Array, best: jax.Array, unit: Unit, target: jax.Array, active: jax.Array
) -> jax.Array:
    """The threshold of rows whose `best` weights do not reach the target."""
    total = _measure(weights, jnp.zeros_like(target), unit)

    def odds(kept: jax.Array) -> jax.Array:
        # In log-odds over log-weight what a threshold keeps is nearly a line.
        least = 1e-6 * total
        return jnp.log((kept + least) / (total - kept + least))

    aim = odds(target)
    last = best[:, -1:]
    hi = _bits(last[:, 0]) + 1
    hi_sum = jnp.where(best > last, unit(best), 0.0).sum(axis=1)
    lo = jnp.where(active, 0, hi)
    start = _Bracket(lo, hi, total, hi_sum, odds(total) - aim, odds(hi_sum) - aim, jnp.zeros_like(active))

    def is_open(b: _Bracket) -> jax.Array:
        most_inside = (b.lo_sum - b.hi_sum) / jnp.maximum(unit(_value(b.lo)), 1e-30)
        return (b.hi - b.lo > 1) & (most_inside > LARGEST)

    def narrow(state: tuple[jax.Array, _Bracket]) -> tuple[jax.Array, _Bracket]:
        turn, b = state
        # Never quite at an end: where one is at the target already, the other must follow.
        share = jnp.where(turn < SECANTS, jnp.clip(b.lo_odds / (b.lo_odds - b.hi_odds), 0.01, 0.99), 0.5)
        width = b.hi - b.lo
        step = (width.astype(jnp.float32) * share).astype(jnp.int32)
        # Weights are spread over some thirty powers of two: the first step goes no further down.
        step = jnp.where(turn == 0, jnp.maximum(step, width - (30 << 23)), step)
        pivot = jnp.where(is_open(b), b.lo + jnp.clip(step, 1, jnp.maximum(width - 1, 1)), b.lo)
        kept = _measure(weights, _value(pivot), unit)
        reached, found = kept >= target, odds(kept) - aim
        # An end that stays for a second time pulls half as strongly (the Illinois rule).
        return turn + 1, _Bracket(
            jnp.where(reached, pivot, b.lo),
            jnp.where(reached, b.hi, pivot),
            jnp.where(reached, kept, b.lo_sum),
            jnp.where(reached, b.hi_sum, kept),
            jnp.where(reached, found, jnp.where(b.rose | (turn == 0), 1.0, 0.5) * b.lo_odds),
            jnp.where(reached, jnp.where(b.rose, 0.5, 1.0) * b.hi_odds, found),
            reached,
        )

    _, end = lax.while_loop(lambda state: is_open(state[1]).any(), narrow, (jnp.int32(0), start))
    below = jnp.where(weights < _value(end.hi)[:, None, None], weights, 0.0)
    inside, _ = largest(below, LARGEST)
    sums = end.hi_sum[:, None] + jnp.cumsum(unit(inside), axis=1)
    return jnp.maximum(_first_reaching(inside, sums, target), _value(end.lo))


def _first_reaching(falling: jax.Array, sums: jax.Array, target: jax.Array) -> jax.Array:
    """The first of the falling values [B, n] at which `sums` reaches the target, or the last."""
    place = jnp.minimum((sums < target[:, None]).sum(axis=1), falling.shape[1] - 1)
    return jnp.take_along_axis(falling, place[:, None], axis=1)[:, 0]


def _measure(weights: jax.Array, threshold: jax.Array, unit: Unit) -> jax.Array:
    """f32[B]: the units of what a threshold keeps."""
    return jnp.where(weights >= threshold[:, None, None], unit(weights), 0.0).sum(axis=(1, 2))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _value(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
