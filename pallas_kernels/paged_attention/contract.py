"""What every reading of paged attention keeps to: its arguments, and the pages that a request visits.

Knows nothing of how the products are computed, nor on what device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32, Shaped

NO_PAGE = 2**30
"""A `page_index` that no context reaches: the mark of a block table's entry that holds no page."""


class QuantizedPages(NamedTuple):
    """K and V in 8 bits: each vector of H is values * scale, the scale per token and KV head.

    Attributes:
        values: int8, or float8_e4m3fn, or the bits of the latter as uint8.
        scales: of K and of V; as free to hold anything beyond the context as the values are.
    """

    values: Shaped[Array, "P 2 K p H"]
    scales: Float32[Array, "P 2 K p"]

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, 2, K, p, H], as of pages that are one array."""
        return self.values.shape


Pages = Shaped[Array, "P 2 K p H"] | QuantizedPages


def logical_dtype(pages: Pages, dtype: DTypeLike | None) -> jnp.dtype:
    """The type that `pages` hold: their own, or that whose bits they keep as uint16 or uint8.

    Raises:
        ValueError: another `dtype`, none where bits need one, or an array of a dtype that no pages have.
    """
    if isinstance(pages, QuantizedPages):
        return _quantized_dtype(pages, dtype)
    if pages.dtype == jnp.uint16:
        if dtype is None or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"pages are uint16 bit patterns: dtype must be bfloat16 or float16, got {dtype}")
        return jnp.dtype(dtype)
    if pages.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            "pages must be float32, bfloat16, float16 or uint16 bits, or QuantizedPages of 8 bits, "
            f"got {pages.dtype}"
        )
    return _agreed(pages.dtype, dtype)


def _quantized_dtype(pages: QuantizedPages, dtype: DTypeLike | None) -> jnp.dtype:
    stored = pages.values.dtype
    if stored not in (jnp.int8, jnp.float8_e4m3fn, jnp.uint8) or pages.scales.dtype != jnp.float32:
        raise ValueError(
            "quantised pages must be int8, float8_e4m3fn or its bits as uint8, with float32 scales, "
            f"got {stored} with {pages.scales.dtype}"
        )
    return _agreed(jnp.dtype(jnp.float8_e4m3fn) if stored == jnp.uint8 else stored, dtype)


def _agreed(held: jnp.dtype, dtype: DTypeLike | None) -> jnp.dtype:
    if dtype is not None and jnp.dtype(dtype) != held:
        raise ValueError(f"pages are {held}, but dtype says {jnp.dtype(dtype)}: leave dtype out")
    return held


def check_shapes(
    q: Shaped[Array, "..."],
    pages: Shaped[Array, "..."] | QuantizedPages,
    block_tables: Shaped[Array, "..."],
    context_lens: Shaped[Array, "..."],
    page_index: Shaped[Array, "..."],
    q_positions: Shaped[Array, "..."],
) -> None:
    """Raises a ValueError that names the first shape that does not fit."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, Q, N, H], got shape {q.shape}")
    if len(pages.shape) != 5 or pages.shape[1] != 2:
        raise ValueError(f"pages must be [P, 2, K, p, H], got shape {pages.shape}")
    if isinstance(pages, QuantizedPages) and pages.scales.shape != pages.shape[:4]:
        raise ValueError(f"the scales of pages {pages.shape} must be [P, 2, K, p], got {pages.scales.shape}")
    if q.shape[3] != pages.shape[4]:
        raise ValueError(f"q has head dimension {q.shape[3]}, but pages have {pages.shape[4]}")
    if q.shape[2] % pages.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {pages.shape[2]} KV heads evenly")
    for name, array in (("block_tables", block_tables), ("page_index", page_index)):
        if array.ndim != 2 or array.shape[0] != q.shape[0] or array.shape != block_tables.shape:
            raise ValueError(
                f"block_tables and page_index must both be [B={q.shape[0]}, M], {name} is {array.shape}"
            )
    for name, array, shape in (
        ("context_lens", context_lens, q.shape[:1]),
        ("q_positions", q_positions, q.shape[:2]),
    ):
        if array.shape != shape:
            raise ValueError(f"q is {q.shape}: {name} must be {shape}, got {array.shape}")


def as_held(stored: Shaped[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Stored pages as the numbers that they hold: the same bits."""
    is_bits = stored.dtype in (jnp.uint16, jnp.uint8)
    return jax.lax.bitcast_convert_type(stored, dtype) if is_bits else stored


def read_float32(pages: Pages, index: Any, dtype: DTypeLike | None) -> Float32[Array, "..."]:
    """`pages[index]`, whole vectors, as the numbers that they hold; `dtype` as in `paged_attention`."""
    held = logical_dtype(pages, dtype)
    if not isinstance(pages, QuantizedPages):
        return as_held(pages[index], held).astype(jnp.float32)
    return as_held(pages.values[index], held).astype(jnp.float32) * pages.scales[index][..., None]


def as_bfloat16(values: Shaped[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Quantised values of any storage, exactly, by integer operations: XLA has none on 8-bit floats that
    are quick on a CPU. The two patterns of NaN become +-480, so that all are finite."""
    if values.dtype == jnp.int8:
        return values.astype(jnp.bfloat16)
    bits = values if values.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(values, jnp.uint8)
    wide = bits.astype(jnp.uint16)
    magnitude, sign = wide & 0x7F, (wide & 0x80) << 8
    # The exponent's bias is 7 there and 127 here. Below 2^-6 a step is 2^-9; here those are normal.
    normal = (magnitude << 4) + (120 << 7)
    two_to_seven = jnp.where(
        magnitude < 4, (119 << 7) + ((magnitude & 1) << 6), (120 << 7) + ((magnitude & 3) << 5)
    )
    subnormal = jnp.where(magnitude < 2, magnitude * (118 << 7), two_to_seven)
    wide = jnp.where(magnitude < 8, subnormal, normal)
    return jax.lax.bitcast_convert_type(wide | sign, jnp.bfloat16)


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


def output_like(operand: Float[Array, "..."], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A kernel's float32 output, varying over the mesh axes of a `shard_map` that `operand` varies over."""
    out: jax.ShapeDtypeStruct = jax.eval_shape(
        lambda x: jnp.zeros_like(x, shape=shape, dtype=jnp.float32), operand
    )
    return out


def _ceil_div(a: Int32[Array, "*B"], b: int) -> Int32[Array, "*B"]:
    return (a + (b - 1)) // b
