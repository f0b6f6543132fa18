"""The body of the TPU kernel: attention of one work item, whose pages come through a ring of buffers.

A work item is some query tokens of one request. Knows nothing of layouts outside the call: `tpu.py` makes
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention.online_softmax import LOWEST
from pallas_kernels.paged_attention.tpu_plan import LANES
from pallas_kernels.paged_attention.tpu_ring import Ring, Work

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Of the rows of all heads so many are worked on side by side; more would not stay in registers.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a product becomes a score, in powers of two: both are the caller's times log2(e).

    Attributes:
        scale: of q . k.
        softcap: None: none.
    """

    scale: float
    softcap: float | None

    def __call__(self, products: Float32[Array, "R S"], k_scales: Float32[Array, "R S"] | None) -> Array:
        scores = products * self.scale
        if k_scales is not None:
            scores = scores * k_scales
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def attend_item(*refs: Any, work: Work, scoring: Scoring, quantized: bool) -> None:
    """One item: o and lse over its pages.

    Refs: the tables of `tpu_ring.Tables`; q [J R C] and the first visible positions [R 1] in VMEM; the pages,
    and if quantized their scales, in HBM; the outputs o [J R C] and lse [J R LANES]; the buffers; the sums
    [J R LANES]; cursor and semaphores of the ring. J groups of KV heads, C = H times the heads of a group.
    """
    sources = 2 if quantized else 1
    tables, (q, first), refs = refs[:6], refs[6:8], refs[8:]
    pages, (o, lse), refs = refs[:sources], refs[sources : sources + 2], refs[sources + 2 :]
    buffers, (total, cursor, arrived) = refs[:sources], refs[sources:]
    ring = Ring(tables, work, pages, buffers, cursor, arrived)
    item = ring.item

    # Until the end lse holds the running maximum, in all lanes, and total a sum for each lane.
    lse[...] = jnp.full(lse.shape, LOWEST, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    o[...] = jnp.zeros(o.shape, jnp.float32)

    def turn(i: Array, carry: None) -> None:
        entry = item.start + i * work.pages
        slot = ring.take(entry)
        key = ring.positions(entry, first.shape[0])
        visible = (key < item.context_len) & (key >= jnp.broadcast_to(first[...], key.shape))

        @pl.when(entry + work.pages >= item.stop)
        def _() -> None:
            _clear_from(ring.cached(entry), buffers[0].at[slot, 1], work)

        tokens = _Turn(work, scoring, [buffer.at[slot] for buffer in buffers], visible)
        tokens.attend(q, lse, total, o)

    jax.lax.fori_loop(0, pl.cdiv(item.stop - item.start, work.pages), turn, None)
    sums = jnp.sum(total[...], axis=-1, keepdims=True)
    seen = sums > 0
    sums = jnp.where(seen, sums, 1.0)
    o[...] = o[...] / sums
    lse[...] = jnp.where(seen, LN_2 * lse[...] + jnp.log(sums), -jnp.inf)


def _clear_from(cached: Int32[Array, ""], v: Any, work: Work) -> None:
    """Zeroes V [K S H] from token `cached` on: it may be NaN there, and 0 x NaN is NaN."""
    is_fp8 = v.dtype in (jnp.float8_e4m3fn, jnp.uint8)
    if v.dtype == jnp.int8 or (is_fp8 and work.fp8 == jnp.float8_e4m3b11fnuz):
        return  # finite, whatever the bits
    token = jax.lax.broadcasted_iota(jnp.int32, v.shape[1:], 1 if work.tokens_in_lanes else 0)

    def clear(head: Array, _: None) -> None:
        # In 32 bits, because not every TPU selects among fewer.
        wide = jnp.int32 if v.dtype == jnp.uint8 else jnp.float32
        v[head] = jnp.where(token < cached, v[head].astype(wide), 0).astype(v.dtype)

    jax.lax.fori_loop(0, v.shape[0], clear, None)


class _Turn:
    """The products of the S tokens that one slot of the ring holds."""

    def __init__(self, work: Work, scoring: Scoring, buffers: Sequence[Any], visible: Bool[Array, "R S"]):
        self._work, self._scoring, self._visible = work, scoring, visible
        self._kv, *scales = buffers
        self._scales = scales[0] if scales else None
        rebiased = self._kv.dtype != jnp.int8 and work.fp8 == jnp.float8_e4m3b11fnuz
        self._unit = 16.0 if rebiased else 1.0

    def attend(self, q: Any, maximum: Any, total: Any, o: Any) -> None:
        """Adds to the running maximum, the sums and the weighted sum of every row."""
        groups, rows, _ = q.shape
        at_once = max(
            n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * rows <= _ROWS_AT_ONCE)
        )

        def some(i: Array | int, _: None) -> None:
            these = [i * at_once + j for j in range(at_once)]
            # Step by step for all of them, so that each hides the latency of the others.
            scores = [self._scores(q[g], g) for g in these]
            softened = [
                self._soften(s, maximum.at[g], total.at[g]) for s, g in zip(scores, these, strict=True)
            ]
            for (weights, shrink), g in zip(softened, these, strict=True):
                o[g] = o[g] * _across(shrink, o.shape[2]) + self._weighted(weights, g)

        if at_once == groups:
            some(0, None)
        else:
            jax.lax.fori_loop(0, groups // at_once, some, None)

    def _scores(self, q: Float[Array, "R C"], group: Array | int) -> Float32[Array, "R S"]:
        k = self._block(0, group)
        products = _product(q, k, 0 if self._work.tokens_in_lanes else 1)
        return jnp.where(self._visible, self._scoring(products, self._row_scales(0, group)), -jnp.inf)

    def _soften(self, scores: Float32[Array, "R S"], maximum: Any, total: Any) -> tuple[Array, Array]:
        """The weights of the scores [R S], and by how much earlier ones shrink [R LANES]."""
        old = maximum[...]
        new = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
        shrink = jnp.exp2(old - new)
        weights = jnp.exp2(scores - _across(new, scores.shape[1]))
        maximum[...] = new
        columns = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
        total[...] = total[...] * shrink + sum(columns[1:], columns[0])
        return weights, shrink

    def _weighted(self, weights: Float32[Array, "R S"], group: Array | int) -> Float32[Array, "R D"]:
        scales = self._row_scales(1, group)
        if scales is not None:  # like V they may be NaN beyond the context
            weights = jnp.where(self._visible, weights * scales, 0.0)
        v = self._block(1, group)
        exact = jnp.float32 if v.dtype == jnp.float32 else jnp.bfloat16
        return _product(weights.astype(exact), v, 1 if self._work.tokens_in_lanes else 0)

    def _block(self, part: int, group: Array | int) -> Float[Array, "..."]:
        """K or V of the heads of a group, side by side."""
        h = self._work.heads
        heads = [self._kv[part, group * h + i] for i in range(h)]
        if self._scales is not None:
            heads = [_factor(head, self._work.fp8) for head in heads]
        return heads[0] if h == 1 else jnp.concatenate(heads, axis=0 if self._work.tokens_in_lanes else 1)

    def _row_scales(self, part: int, group: Array | int) -> Float32[Array, "R S"] | None:
        """The scales of K or V of each row's own head."""
        if self._scales is None:
            return None
        h, (rows, S) = self._work.heads, self._visible.shape
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, S), 0)
        scales = None
        for i in range(h):
            of_pages = [self._scales[page, part, pl.ds(group * h + i, 1)] for page in range(self._work.pages)]
            of_head = jnp.broadcast_to(jnp.concatenate(of_pages, axis=1) * self._unit, (rows, S))
            scales = (
                of_head if scales is None else jnp.where(row >= i * self._work.head_rows, of_head, scales)
            )
        return scales


def _factor(stored: Any, fp8: DTypeLike | None) -> Array:
    """8-bit values as a factor of a product with bfloat16; those of the rebiased type are a sixteenth."""
    if stored.dtype == jnp.int8:
        return stored.astype(jnp.bfloat16)
    if fp8 == jnp.float8_e4m3b11fnuz:
        return _rebiased(stored)
    floats = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn) if stored.dtype == jnp.uint8 else stored
    return floats if fp8 == jnp.float8_e4m3fn else floats.astype(jnp.bfloat16)


def _rebiased(stored: Shaped[Array, "A C"]) -> Shaped[Array, "A C"]:
    """The same bits as of a type whose exponent's bias is greater by 4: a sixteenth of the value.

    It has no infinities, no -0, and NaN where that would be: 0x80 becomes 0. Four bytes at a time.
    """
    words = pltpu.bitcast(stored, jnp.int32)
    low = jnp.int32(0x7F7F7F7F)
    # The sum carries into a byte's sign bit where its other bits are not all 0.
    words = words & (((words & low) + low) | low)
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz)


def _product(a: Float[Array, "R C"], b: Float[Array, "..."], axis: int) -> Float32[Array, "R D"]:
    """a . b, summed over this axis of b."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _across(x: Float32[Array, "R LANES"], width: int) -> Float32[Array, "R D"]:
    """What is equal in all lanes, `width` wide."""
    copies = [x] * (width // LANES)
    rest = [x[:, : width % LANES]] if width % LANES else []
    return jnp.concatenate([*copies, *rest], axis=1)
