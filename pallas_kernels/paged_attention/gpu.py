"""Paged attention for NVIDIA GPUs: a Pallas-Triton kernel over parts of contexts, which `gpu_merge` joins.

A program walks its equal share of the batch's cached tokens (see `gpu_plan`) for one KV head and one tile of
query rows, a block of tokens at a time, while Triton copies the next blocks into shared memory.

Bytes that a call moves for each KV head: of a cached token 2 H values, once for every tile of the R = Q G
query rows (decoding has one tile), and 8 of scales where pages are quantised; of a page two ids; of a part
the R (H + 1) floats of (o, lse), written once and read once. There are at most programs + B parts, so with
G = 4 and bfloat16 they come to less than 2 % of the pages where a part has 512 tokens or more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention import online_softmax
from pallas_kernels.paged_attention.contract import (
    Pages,
    QuantizedPages,
    first_visible,
    fold_queries,
    output_like,
    unfold_queries,
)
from pallas_kernels.paged_attention.gpu_merge import merge_parts
from pallas_kernels.paged_attention.gpu_plan import SplitPlan, plan_splits


class Tiling(NamedTuple):
    """How the kernel is cut: query rows and cached tokens at a time, and blocks on their way or in use."""

    rows: int
    block: int
    stages: int


# Tokens of a block, and stages, by the bytes of a vector of H. Chosen by what ptxas says for sm_80 to sm_100
# (tests/aot/test_gpu_kernels.py asks again), not timed: no spills, and in shared memory there is room for two
# programs on a multiprocessor of an A100, H100 or B200 and for one on that of an L40S.
_DECODE = {128: (64, 4), 256: (64, 3), 512: (32, 3), 1024: (16, 3)}
_CHUNK = {128: (64, 3), 256: (64, 2), 512: (32, 2), 1024: (16, 2)}

WARPS = 4

MIN_ROWS, MAX_ROWS = 16, 64
"""The least rows that Triton multiplies, to which fewer are padded, and the most that fit the registers."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Two, so that one copies while the other multiplies; more would only be more parts to merge."""

INTERPRETED_PROGRAMS = 8

_KEYS, _VALUES = 0, 1  # of a page's second axis


def choose_tiling(num_rows: int, head_dim: int, itemsize: int) -> Tiling:
    """The tiling for R query rows per KV head and vectors of H values of so many bytes."""
    most = MIN_ROWS if itemsize == 4 else MAX_ROWS  # float32 goes without tensor cores: more rows spill
    rows = min(max(pl.next_power_of_2(num_rows), MIN_ROWS), most)
    table = _DECODE if rows == MIN_ROWS else _CHUNK
    vector = min(max(pl.next_power_of_2(head_dim) * itemsize, min(table)), max(table))
    block, stages = table[vector]
    return Tiling(rows, block, stages)


def split_plan_gpu(
    q: Float[Array | jax.ShapeDtypeStruct, "B Q N H"],
    pages: Pages | jax.ShapeDtypeStruct,
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    interpret: bool = False,
) -> SplitPlan:
    """See `pallas_kernels.split_plan`."""
    _, _, K, page_size, H = pages.shape
    R = q.shape[1] * (q.shape[2] // K)
    values = pages.values if isinstance(pages, QuantizedPages) else pages
    tiling = choose_tiling(R, H, values.dtype.itemsize)
    resident = INTERPRETED_PROGRAMS if interpret else PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors()
    return plan_splits(
        context_lens,
        page_index,
        q_positions,
        window,
        page_size=page_size,
        block=tiling.block,
        programs=max(1, resident // (K * pl.cdiv(R, tiling.rows))),
    )


def paged_attention_gpu(
    q: Float[Array, "B Q N H"],
    pages: Pages,
    block_tables: Int32[Array, "B M"],
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None,
    dtype: jnp.dtype,
    plan: SplitPlan | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. Quantised pages are multiplied as bfloat16, others as they are.

    Pages of float8_e4m3fn need a GPU that converts them (compute capability 8.9 and later); their bits as
    uint8 do not.

    Args:
        plan: of `split_plan_gpu`; None makes one here.

    Raises:
        ValueError: a pool whose values Pallas-Triton cannot address, or a plan for another batch.
    """
    values, scales = pages if isinstance(pages, QuantizedPages) else (pages, None)
    _check_addressable(values)
    Q, K, H = q.shape[1], pages.shape[2], q.shape[3]
    if plan is None:
        plan = split_plan_gpu(q, pages, context_lens, page_index, q_positions, window, interpret=interpret)
    if plan.request_parts.shape[0] != q.shape[0] + 1:
        raise ValueError(
            f"q has {q.shape[0]} requests, but the plan is of {plan.request_parts.shape[0] - 1}: "
            "each shape of q needs a plan of its own"
        )
    rows = fold_queries(q, K).astype(dtype if scales is None else jnp.bfloat16)
    R = rows.shape[2]
    tiling = choose_tiling(R, H, values.dtype.itemsize)
    parts, programs = plan.start.shape[0], plan.program_parts.shape[0] - 1
    o, lse = pl.pallas_call(
        functools.partial(_attend_parts, tiling=tiling, scale=scale, softcap=softcap),
        grid=(pl.cdiv(R, tiling.rows), K, programs),
        out_shape=(output_like(rows, (parts, K, R, H)), output_like(rows, (parts, K, R))),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=tiling.stages),
        interpret=interpret,
        name="paged_attention_parts",
    )(
        plan,
        block_tables,
        page_index,
        context_lens,
        first_visible(q_positions, window),
        rows,
        values,
        scales,
    )
    o, lse = merge_parts(o, lse, plan.request_parts, interpret=interpret)
    return unfold_queries(o, Q), unfold_queries(lse, Q)


_Carry = tuple[online_softmax.State, tuple[Array, Array]]
"""What is seen, and the page and place of the next block."""


def _attend_parts(
    plan: Any,
    block_tables: Any,
    page_index: Any,
    context_lens: Any,
    first: Any,
    q: Any,
    values: Any,
    scales: Any,
    o: Any,
    lse: Any,
    *,
    tiling: Tiling,
    scale: float,
    softcap: float | None,
) -> None:
    """One program: its parts of the plan, one after another. All are references to whole arrays; q, o
    and lse have KV heads and their rows apart, [B K R H], [I K R H] and [I K R]."""
    tile, head, program = (pl.program_id(axis) for axis in range(3))
    R, H = q.shape[2:]
    page_size = values.shape[3]
    group = R // first.shape[1]
    on_one_page = page_size % tiling.block == 0
    row = tile * tiling.rows + jnp.arange(tiling.rows, dtype=jnp.int32)
    column = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
    lane = jnp.arange(tiling.block, dtype=jnp.int32)
    in_row, in_column = (row < R)[:, None], (column < H)[None, :]

    def part(i: Array, carry: Array) -> Array:
        b = plan.request[i]
        start, stop, context_len = plan.start[i], plan.stop[i], context_lens[b]
        queries = _load(q.at[b, head, row[:, None], column[None, :]], in_row & in_column)
        row_first = _load(first.at[b, jax.lax.div(row, group)], row < R)

        def slots(j: Array | int) -> Array:
            """Those to look up for block j: all of it, or the first where it lies on one page."""
            first_slot = start + j * tiling.block
            return first_slot if on_one_page else first_slot + lane

        def look_up(j: Array | int) -> tuple[Array, Array]:
            slot = slots(j)
            entry = jax.lax.div(slot, page_size)
            page = _load(block_tables.at[b, entry], slot < stop)
            return page, plgpu.load(page_index.at[b, entry], mask=slot < stop, other=context_len)

        def turn(j: Array, carry: _Carry) -> _Carry:
            state, found = carry
            page, place = (jnp.broadcast_to(x, lane.shape) for x in found)
            offset = jax.lax.rem(slots(j), page_size) + (lane if on_one_page else 0)
            position = place * page_size + offset
            # What lies beyond the context is not read: it may be NaN, and 0 x NaN is NaN.
            cached = position < context_len

            def read(half: int) -> Float[Array, "S H"]:
                vectors = values.at[page[:, None], half, head, offset[:, None], column[None, :]]
                return _as_float(_load(vectors, cached[:, None] & in_column), q.dtype)

            def read_scale(half: int) -> Float32[Array, "1 S"]:
                return _unit(values.dtype) * _load(scales.at[page, half, head, offset], cached)[None, :]

            scores = online_softmax.score(
                queries,
                read(_KEYS),
                cached[None, :] & (position[None, :] >= row_first[:, None]),
                scale=scale if scales is None else scale * read_scale(_KEYS),
                softcap=softcap,
            )
            v = read(_VALUES)
            state = online_softmax.attend(state, scores, v, None if scales is None else read_scale(_VALUES))
            # Looked up a turn ahead, so that no copy of pages waits for it.
            return state, look_up(j + 1)

        turns = pl.cdiv(stop - start, tiling.block)
        nothing = online_softmax.start(tiling.rows, column.shape[0])
        state, _ = jax.lax.fori_loop(0, turns, turn, (nothing, look_up(0)))
        part_o, part_lse = online_softmax.finish(state)
        plgpu.store(o.at[i, head, row[:, None], column[None, :]], part_o, mask=in_row & in_column)
        plgpu.store(lse.at[i, head, row], part_lse[:, 0], mask=row < R)
        return carry

    jax.lax.fori_loop(plan.program_parts[program], plan.program_parts[program + 1], part, 0)


def _load(ref: Any, mask: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """What the reference names, 0 where it is masked."""
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _as_float(values: Shaped[Array, "S H"], dtype: jnp.dtype) -> Float[Array, "S H"]:
    """Pages as they are multiplied: the same values, in units of `_unit`."""
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values, dtype)
    if values.dtype == jnp.uint8:
        # A float8_e4m3fn is a float16 with a shorter fraction and an exponent whose bias is 8 less. Once
        # extended and shifted, the sign stands in its own bit and in the next.
        wide = jax.lax.bitcast_convert_type(values, jnp.int8).astype(jnp.int16) << 7
        values = jax.lax.bitcast_convert_type(wide & jnp.int16(~0x4000), jnp.float16)
    return values.astype(dtype)


def _unit(stored: jnp.dtype) -> float:
    """What a value of `_as_float` counts: a factor of the scales, of which there are fewer."""
    return 2.0**8 if stored == jnp.uint8 else 1.0


def _check_addressable(values: Shaped[Array, "P 2 K p H"]) -> None:
    """Pallas-Triton counts elements with a sign in 32 bits where an array has at most 2^32 bytes."""
    if values.size > 2**31 and values.nbytes <= 2**32:
        raise ValueError(
            f"{values.shape[0]} pages of {values.dtype} come to {values.nbytes / 2**30:.2f} GiB: on a gpu a "
            "layer's one-byte pages take at most 2 GiB, or more than 4: choose another number of pages"
        )


def _multiprocessors() -> int:
    """Of this process's GPU; of an H100 where it has none and compiles for another machine."""
    try:
        count: int = jax.devices("gpu")[0].core_count
    except RuntimeError:
        return 132
    return count
