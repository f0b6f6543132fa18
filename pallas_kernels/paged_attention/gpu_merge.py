"""The parts of each request joined to one (o, lse) by their lse, n at a time: a small Pallas-Triton kernel.

Knows nothing of pages: a part is a normalised output and the log-sum-exp of its scores.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels.paged_attention.contract import output_like
from pallas_kernels.paged_attention.online_softmax import LOWEST

PARTS_AT_A_TIME = 8


def merge_parts(
    o: Float32[Array, "I K R H"],
    lse: Float32[Array, "I K R"],
    request_parts: Int32[Array, " edges"],
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, "B K R H"], Float32[Array, "B K R"]]:
    """Attention over all that the parts request_parts[b] <= i < request_parts[b + 1] saw, for each b.

    A part that saw nothing has lse = -inf and any finite o; a request of no part, or of such only, gets
    o = 0 and lse = -inf. Other parts are not read.
    """
    (_, K, R, H), B = o.shape, request_parts.shape[0] - 1
    merged: tuple[Array, Array] = pl.pallas_call(
        _merge_row,
        grid=(R, K, B),
        out_shape=(output_like(o, (B, K, R, H)), output_like(o, (B, K, R))),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=2),
        interpret=interpret,
        name="paged_attention_merge",
    )(request_parts, o, lse)
    return merged


def _merge_row(request_parts: Any, part_o: Any, part_lse: Any, o: Any, lse: Any) -> None:
    """One program: one query row of one KV head of one request."""
    row, head, b = (pl.program_id(axis) for axis in range(3))
    start, stop = request_parts[b], request_parts[b + 1]
    column = jnp.arange(pl.next_power_of_2(o.shape[3]), dtype=jnp.int32)
    in_column = column < o.shape[3]

    def turn(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, weighted = state
        i = start + j * PARTS_AT_A_TIME + jnp.arange(PARTS_AT_A_TIME, dtype=jnp.int32)
        here = i < stop
        scores = plgpu.load(part_lse.at[i, head, row], mask=here, other=-jnp.inf)
        values = plgpu.load(
            part_o.at[i[:, None], head, row, column[None, :]],
            mask=here[:, None] & in_column[None, :],
            other=0.0,
        )
        new_maximum = jnp.maximum(maximum, jnp.max(scores))
        shrink, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum)
        weighted = weighted * shrink + jnp.sum(weights[:, None] * values, axis=0)
        return new_maximum, total * shrink + jnp.sum(weights), weighted

    nothing = (jnp.float32(LOWEST), jnp.float32(0.0), jnp.zeros(column.shape, jnp.float32))
    turns = pl.cdiv(stop - start, PARTS_AT_A_TIME)
    maximum, total, weighted = jax.lax.fori_loop(0, turns, turn, nothing)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    plgpu.store(o.at[b, head, row, column], weighted / total, mask=in_column)
    lse[b, head, row] = jnp.where(seen, maximum + jnp.log(total), -jnp.inf)
