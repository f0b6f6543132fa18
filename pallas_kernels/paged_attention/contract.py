"""What every reading of paged attention keeps to: its arguments, and the pages that a request visits.

Knows nothing of how the products are computed, nor on what device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

NO_PAGE = 2**30
"""A `page_index` that no context reaches: the mark of a block table's entry that holds no page."""


def logical_dtype(pages: Shaped[Array, "P 2 K p H"], dtype: DTypeLike | None) -> jnp.dtype:
    """The float type that `pages` hold: their own, or `dtype` where they keep its bits as uint16."""
    if pages.dtype == jnp.uint16:
        if dtype is None or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"pages are uint16 bit patterns: dtype must be bfloat16 or float16, got {dtype}")
        return jnp.dtype(dtype)
    if pages.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"pages must be float32, bfloat16, float16 or uint16 bits, got {pages.dtype}")
    if dtype is not None and jnp.dtype(dtype) != pages.dtype:
        raise ValueError(f"pages are {pages.dtype}, but dtype says {jnp.dtype(dtype)}: leave dtype out")
    return pages.dtype


def check_shapes(
    q: Shaped[Array, "..."],
    pages: Shaped[Array, "..."],
    block_tables: Shaped[Array, "..."],
    page_index: Shaped[Array, "..."],
) -> None:
    """Raises a ValueError that names the first shape that does not fit."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, Q, N, H], got shape {q.shape}")
    if pages.ndim != 5 or pages.shape[1] != 2:
        raise ValueError(f"pages must be [P, 2, K, p, H], got shape {pages.shape}")
    if q.shape[3] != pages.shape[4]:
        raise ValueError(f"q has head dimension {q.shape[3]}, but pages have {pages.shape[4]}")
    if q.shape[2] % pages.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {pages.shape[2]} KV heads evenly")
    for name, array in (("block_tables", block_tables), ("page_index", page_index)):
        if array.ndim != 2 or array.shape[0] != q.shape[0] or array.shape != block_tables.shape:
            raise ValueError(
                f"block_tables and page_index must both be [B={q.shape[0]}, M], {name} is {array.shape}"
            )


def as_float(stored: Shaped[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Stored pages as the floats that they hold: the same bits."""
    return jax.lax.bitcast_convert_type(stored, dtype) if stored.dtype == jnp.uint16 else stored


def first_visible(q_positions: Int32[Array, "B Q"], window: Int32[Array, ""] | int) -> Int32[Array, "B Q"]:
    """The first position that each new token may see, t - window + 1; below 0: all of them."""
    return q_positions - jnp.asarray(window, jnp.int32) + 1


def slot_positions(
    page_index: Int32[Array, "*B M"], context_lens: Int32[Array, "*B"], page_size: int
) -> Int32[Array, "*B S"]:
    """The position in its request of every slot of the pages; at least the context where there is no page.

    The product overflows for NO_PAGE, hence the second case.
    """
    in_context = page_index < _ceil_div(context_lens, page_size)[..., None]
    starts = jnp.where(in_context, page_index * page_size, context_lens[..., None])
    offsets = jax.lax.broadcasted_iota(jnp.int32, (*starts.shape, page_size), starts.ndim)
    return (starts[..., None] + offsets).reshape(*starts.shape[:-1], -1)


def visited_entries(
    page_index: Int32[Array, "B M"],
    context_lens: Int32[Array, "B"],
    first: Int32[Array, "B Q"],
    page_size: int,
) -> tuple[Int32[Array, "B"], Int32[Array, "B"]]:
    """(start, stop): the entries start <= m < stop of each block table hold all that a row may see.

    They are neighbours because `page_index` increases along m. Pages wholly before the window of every
    query token are left out.
    """
    first_place = jnp.min(first, axis=1) // page_size
    end_place = _ceil_div(context_lens, page_size)
    start = jnp.sum(page_index < first_place[:, None], axis=1, dtype=jnp.int32)
    stop = jnp.sum(page_index < end_place[:, None], axis=1, dtype=jnp.int32)
    return start, stop


def fold_queries(q: Float[Array, "B Q N H"], num_kv_heads: int) -> Float[Array, "B K R H"]:
    """The rows that meet one KV head, query token major: R = Q G, row r is token r // G."""
    B, Q, N, H = q.shape
    groups = q.reshape(B, Q, num_kv_heads, N // num_kv_heads, H)
    return groups.transpose(0, 2, 1, 3, 4).reshape(B, num_kv_heads, -1, H)


def unfold_queries(rows: Float[Array, "B K R ..."], num_queries: int) -> Float[Array, "B Q N ..."]:
    """The inverse of `fold_queries`, for o and lse."""
    B, K, R, *rest = rows.shape
    groups = rows.reshape(B, K, num_queries, R // num_queries, *rest)
    return jnp.moveaxis(groups, 1, 2).reshape(B, num_queries, -1, *rest)


def _ceil_div(a: Int32[Array, "*B"], b: int) -> Int32[Array, "*B"]:
    return (a + (b - 1)) // b
