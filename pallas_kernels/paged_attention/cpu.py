"""Paged attention for XLA on a CPU: one request after another, a few pages per turn of a loop.

XLA runs such a loop on one core at the speed of reading the pages once; gathering them all first, or
computing all requests per turn, is 2 to 5 times slower. Two virtual devices use two cores.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention import online_softmax
from pallas_kernels.paged_attention.contract import (
    NO_PAGE,
    Pages,
    QuantizedPages,
    as_bfloat16,
    as_held,
    first_visible,
    fold_queries,
    slot_positions,
    unfold_queries,
    visited_entries,
)

# Beyond so many query rows per KV head the products outweigh the copies of pages side by side.
CHUNK_ROWS = 32
CHUNK_PAGES = 4


class _Request(NamedTuple):
    """What one request brings, R = Q G rows for each KV head (leading axis B before `lax.map`)."""

    q: Float[Array, "*B K R H"]
    first: Int32[Array, "*B R"]
    block_table: Int32[Array, "*B M"]
    page_index: Int32[Array, "*B M"]
    context_len: Int32[Array, "*B"]
    start: Int32[Array, "*B"]
    stop: Int32[Array, "*B"]


def paged_attention_cpu(
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
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. 16- and 8-bit floats should come as their bits: XLA on a
    CPU converts a whole pool of such floats before it takes a page of it."""
    _, Q, N, _ = q.shape
    _, _, K, page_size, _ = pages.shape
    G = N // K
    turn_pages = CHUNK_PAGES if Q * G > CHUNK_ROWS else 1
    first = first_visible(q_positions, window)
    start, stop = visited_entries(page_index, context_lens, first, page_size)
    # The last turn may reach beyond the table; a slice that did would be moved back, onto seen pages.
    beyond = ((0, 0), (0, turn_pages - 1))
    requests = _Request(
        q=fold_queries(q, K),
        first=jnp.repeat(first, G, axis=1),
        block_table=jnp.pad(block_tables, beyond),
        page_index=jnp.pad(page_index, beyond, constant_values=NO_PAGE),
        context_len=context_lens,
        start=start,
        stop=stop,
    )
    attend = functools.partial(
        _attend_request, pages=pages, turn_pages=turn_pages, scale=scale, softcap=softcap, dtype=dtype
    )
    o, lse = jax.lax.map(attend, requests)
    return unfold_queries(o, Q), unfold_queries(lse, Q)


def _attend_request(
    request: _Request,
    *,
    pages: Pages,
    turn_pages: int,
    scale: float,
    softcap: float | None,
    dtype: jnp.dtype,
) -> tuple[Float32[Array, "K R H"], Float32[Array, "K R"]]:
    page_size = pages.shape[3]

    def turn(i: Int32[Array, ""], state: online_softmax.State) -> online_softmax.State:
        entry = request.start + i * turn_pages
        table = jax.lax.dynamic_slice_in_dim(request.block_table, entry, turn_pages)
        places = jax.lax.dynamic_slice_in_dim(request.page_index, entry, turn_pages)
        positions = slot_positions(places, request.context_len, page_size)  # [S]
        in_context = positions < request.context_len
        visible = in_context[None, :] & (positions[None, :] >= request.first[:, None])  # [R, S]

        read = _read_pages(pages, table)
        k_scale: Float32[Array, "K 1 S"] | float = scale
        v_scale: Float32[Array, "K 1 S"] | None = None
        if isinstance(read, QuantizedPages):
            (k, v), scales = as_bfloat16(read.values), read.scales[:, :, None]
            k_scale, v_scale = scale * scales[0], _finite(scales[1], in_context)
        else:
            k, v = as_held(read[0], dtype), as_held(_finite(read[1], in_context[:, None]), dtype)
        scores = online_softmax.score(request.q, k, visible[None], scale=k_scale, softcap=softcap)
        return online_softmax.attend(state, scores, v, v_scale)

    turns = (request.stop - request.start + turn_pages - 1) // turn_pages
    state = _varying_like(online_softmax.start(*request.q.shape), pages, *request)
    o, lse = online_softmax.finish(jax.lax.fori_loop(0, turns, turn, state))
    return o, lse[..., 0]


def _read_pages(pages: Pages, table: Int32[Array, "M"]) -> Any:
    """Pages side by side, [2, K, S, H] (of scales [2, K, S]). Slices, because a gather is not fused into
    the products that read it."""

    def side_by_side(array: Shaped[Array, "P ..."]) -> Shaped[Array, "2 K S ..."]:
        one_by_one = [jax.lax.dynamic_index_in_dim(array, page, keepdims=False) for page in table]
        return one_by_one[0] if len(one_by_one) == 1 else jnp.concatenate(one_by_one, axis=2)

    return jax.tree.map(side_by_side, pages)


def _finite(stored: Shaped[Array, "..."], in_context: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """0 beyond the context: what lies there may be NaN, and 0 x NaN is NaN. On the stored bits, because
    selecting among 16-bit floats is slow here; +0 is all zero bits."""
    return jnp.where(in_context, stored, jnp.zeros((), stored.dtype))


def _varying_like(state: online_softmax.State, *operands: Any) -> online_softmax.State:
    """The same values, varying over every mesh axis of a `shard_map` that some operand varies over:
    the type of a loop's carry must be the same before and after a turn."""
    zero = sum(jnp.zeros_like(operand, shape=(), dtype=jnp.float32) for operand in jax.tree.leaves(operands))
    return jax.tree.map(lambda leaf: leaf + zero, state)
