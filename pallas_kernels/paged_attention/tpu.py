"""Paged attention for a TPU: a Pallas (Mosaic) kernel that copies pages into VMEM one ahead of the products.

One grid step is one request. Its block table, in scalar memory, names the pages; each comes whole, K and V
of every KV head, into one of two buffers while the other is worked on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import online_softmax
from pallas_kernels.paged_attention.contract import (
    first_visible,
    fold_queries,
    unfold_queries,
    visited_entries,
)

LANES = 128
SUBLANES = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 16}
"""Rows of a tile of each dtype that the kernel takes."""


def paged_attention_tpu(
    q: Float[Array, "B Q N H"],
    pages: Float[Array, "P 2 K p H"],
    block_tables: Int32[Array, "B M"],
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None,
    interpret: Any = False,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. `interpret` goes to `pl.pallas_call`.

    Both tables must fit scalar memory (8 B M bytes), and two pages and the rows of one request VMEM.

    Raises:
        ValueError: a dtype, a head dimension or a page size that does not fill whole tiles.
    """
    _check_tiles(pages)
    B, Q, N, H = q.shape
    _, _, K, page_size, _ = pages.shape
    sublanes = SUBLANES[pages.dtype]
    rows = Q * (N // K)
    R = -(-rows // sublanes) * sublanes
    first = first_visible(q_positions, window)
    start, stop = visited_entries(page_index, context_lens, first, page_size)

    padding = (0, R - rows)
    folded = jnp.pad(fold_queries(q, K).astype(pages.dtype), ((0, 0), (0, 0), padding, (0, 0)))
    row_first = jnp.pad(jnp.repeat(first, N // K, axis=1), ((0, 0), padding))[:, None, :, None]

    kernel = functools.partial(_kernel, scale=scale, softcap=softcap)
    o, lse = pl.pallas_call(
        kernel,
        out_shape=[_output_like(folded, (B, K, R, H)), _output_like(folded, (B, K, R, LANES))],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B,),
            in_specs=[
                _per_request(K, R, H),
                _per_request(1, R, 1),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[_per_request(K, R, H), _per_request(K, R, LANES)],
            scratch_shapes=[
                pltpu.VMEM((2, *pages.shape[1:]), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_attention",
    )(block_tables.reshape(-1), page_index.reshape(-1), context_lens, start, stop, folded, row_first, pages)
    return unfold_queries(o[:, :, :rows], Q), unfold_queries(lse[:, :, :rows, 0], Q)


def _kernel(
    block_table: Any,
    page_index: Any,
    context_lens: Any,
    starts: Any,
    stops: Any,
    q: Any,
    first: Any,
    pages: Any,
    o: Any,
    lse: Any,
    buffers: Any,
    arrived: Any,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """One request. In scalar memory: int32[B*M] tables, int32[B] the rest; in VMEM: q [K R H], first
    visible positions [1 R 1], the outputs [K R H] and [K R LANES], buffers [2 2 K p H]; pages in HBM."""
    request = pl.program_id(0)
    row = request * (block_table.shape[0] // context_lens.shape[0])
    start, stop, context_len = starts[request], stops[request], context_lens[request]
    K, R, H = q.shape
    page_size = pages.shape[3]

    def copy_of(entry: Array) -> Any:
        buffer = jax.lax.rem(entry, 2)
        page = block_table[row + entry]
        return pltpu.make_async_copy(pages.at[page], buffers.at[buffer], arrived.at[buffer])

    @pl.when(start < stop)
    def _() -> None:
        copy_of(start).start()

    def turn(entry: Array, state: online_softmax.State) -> online_softmax.State:
        @pl.when(entry + 1 < stop)
        def _() -> None:
            copy_of(entry + 1).start()

        copy_of(entry).wait()
        position = page_index[row + entry] * page_size
        k, v = (buffers[jax.lax.rem(entry, 2), part] for part in (0, 1))
        # Comparisons take place in the full shape: Mosaic broadcasts integers more readily than masks.
        key = position + jax.lax.broadcasted_iota(jnp.int32, (K, R, page_size), 2)
        visible = (key < context_len) & (key >= jnp.broadcast_to(first[...], key.shape))
        # What lies beyond the context may be NaN, and 0 x NaN is NaN. In float32, because not every TPU
        # selects among bfloat16.
        slot = position + jax.lax.broadcasted_iota(jnp.int32, (K, page_size, H), 1)
        v = jnp.where(slot < context_len, v.astype(jnp.float32), 0.0).astype(v.dtype)
        return online_softmax.attend(state, q[...], k, v, visible, scale=scale, softcap=softcap)

    state = jax.lax.fori_loop(start, stop, turn, online_softmax.start(K, R, H))
    o[...], row_lse = online_softmax.finish(state)
    lse[...] = jnp.broadcast_to(row_lse, (K, R, LANES))


def _per_request(*shape: int) -> pl.BlockSpec:
    """The block of an array [B, *shape] that grid step b works on."""
    return pl.BlockSpec((None, *shape), lambda b, *_: (b, *(0,) * len(shape)))


def _output_like(operand: Float[Array, "..."], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A float32 output that varies over the mesh axes of a `shard_map` that `operand` varies over."""
    return jax.eval_shape(lambda x: jnp.zeros_like(x, shape=shape, dtype=jnp.float32), operand)


def _check_tiles(pages: Float[Array, "P 2 K p H"]) -> None:
    if pages.dtype not in SUBLANES:
        raise ValueError(f"on a tpu pages must be float32 or bfloat16, got {pages.dtype}")
    page_size, head_dim = pages.shape[3:]
    if head_dim % LANES:
        raise ValueError(
            f"head dimension {head_dim} does not fill the {LANES} lanes of a tpu: pad pages and q to a "
            f"multiple of {LANES}, or use platform=None, which takes any"
        )
    if page_size % SUBLANES[pages.dtype]:
        raise ValueError(
            f"page size {page_size} is no multiple of {SUBLANES[pages.dtype]}, the rows of a tpu's tile of "
            f"{pages.dtype}: choose one that is, such as 64 or 128"
        )
