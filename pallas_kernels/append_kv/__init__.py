"""Writing the keys and values of new tokens into KV pages.

Knows nothing of requests: the caller says in which slot each token goes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.append_kv.tpu import must_put_rows, put_rows
from pallas_kernels.paged_attention.contract import Pages, QuantizedPages
from pallas_kernels.paged_attention.taken import check_taken

__all__ = ["append_kv", "keep_stored", "read_stored"]


def append_kv(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, "T"],
    *,
    platform: str | None = None,
    interpret: bool = False,
) -> Pages:
    """`pages` with k and v of T tokens kept in the given slots; the rest is unchanged.

    Where `pages` is donated to the program that calls this, XLA writes in place. A program that also reads
    the pages must append first and read the result (with the old context length if the new tokens are
    not to be seen): reading first makes XLA copy the pool. A TPU's XLA writes in place only what its layout
    allows; the rest a kernel does, for platform="tpu".

    Quantised pages get each vector over H with a scale of its own, its largest magnitude by the largest
    value of the pages' dtype, and the values rounded to the nearest, ties to even. A vector that
    is not finite stays so in some place.

    Args:
        pages: of the dtype of k and v, or uint16: the bits of a 16-bit dtype; or quantised.
        k, v: of one dtype and not converted; of any float dtypes where pages are quantised.
        slots: page * p + offset, each slot at most once; those outside 0 .. P p - 1 are dropped, which is
            how padding is written.
        platform, interpret: as of `paged_attention`, whose "tpu" takes the same pages here. Works inside
            `jax.jit` and, split by KV head, inside `jax.shard_map`.

    Raises:
        ValueError: dtypes that differ, or pages that "tpu" does not take.
    """
    if k.dtype != v.dtype and not isinstance(pages, QuantizedPages):
        raise ValueError(f"k is {k.dtype}, but v is {v.dtype}: convert one of them first")
    kv = jnp.stack([k, v], axis=1)  # [T, 2, K, H]
    if isinstance(pages, QuantizedPages):
        stored = QuantizedPages(*quantize(kv, pages.values.dtype))
        return keep_stored(pages, stored, slots, platform=platform, interpret=interpret)
    if pages.dtype == jnp.uint16 and kv.dtype.itemsize == 2:
        kv = jax.lax.bitcast_convert_type(kv, jnp.uint16)
    if kv.dtype != pages.dtype:
        raise ValueError(f"k and v are {kv.dtype}, but pages hold {pages.dtype}: convert k and v first")
    return keep_stored(pages, kv, slots, platform=platform, interpret=interpret)


def read_stored(pages: Pages, slots: Int32[Array, "T"]) -> Shaped[Array, "T 2 K H"] | QuantizedPages:
    """What pages hold in some slots, as they hold it: each array as [T, 2, K, ...]."""

    def read(array: Shaped[Array, "P 2 K p *rest"]) -> Shaped[Array, "T 2 K *rest"]:
        return array[slots // array.shape[3], :, :, slots % array.shape[3]]

    return jax.tree.map(read, pages)


def keep_stored(
    pages: Pages,
    stored: Shaped[Array, "T 2 K H"] | QuantizedPages,
    slots: Int32[Array, "T"],
    *,
    platform: str | None = None,
    interpret: bool = False,
) -> Pages:
    """`pages` with what others like them hold (`read_stored`) kept in the given slots; see `append_kv`."""
    if platform == "tpu":
        check_taken("tpu", pages)

    def put(
        array: Shaped[Array, "P 2 K p *rest"], new: Shaped[Array, "T 2 K *rest"]
    ) -> Shaped[Array, "P 2 K p *rest"]:
        if platform == "tpu" and must_put_rows(array, len(slots)):
            return put_rows(array, new, slots, interpret=interpret)
        return _put(array, new, slots)

    return jax.tree.map(put, pages, stored)


def quantize(
    x: Float[Array, "*shape H"], dtype: DTypeLike
) -> tuple[Shaped[Array, "*shape H"], Float32[Array, "*shape"]]:
    """(values, scales) as `QuantizedPages` hold them: int8, float8_e4m3fn, or uint8, the latter's bits.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (jnp.int8, jnp.uint8, jnp.float8_e4m3fn):
        raise ValueError(f"quantised pages are int8, uint8 or float8_e4m3fn, got {jnp.dtype(dtype)}")
    x = x.astype(jnp.float32)
    is_int, is_bits = jnp.dtype(dtype) == jnp.int8, jnp.dtype(dtype) == jnp.uint8
    most = float(jnp.iinfo(jnp.int8).max if is_int else jnp.finfo(jnp.float8_e4m3fn).max)
    # Not 0 for a vector of zeros, nor for one whose quotient would not be a normal number.
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / most, jnp.finfo(jnp.float32).tiny)
    # The quotient of the largest magnitude may be just above the largest value.
    values = jnp.clip(x / scales[..., None], -most, most)
    if is_int:
        return jnp.round(values).astype(jnp.int8), scales
    values = values.astype(jnp.float8_e4m3fn)
    return (jax.lax.bitcast_convert_type(values, jnp.uint8) if is_bits else values), scales


def _put(
    array: Shaped[Array, "P 2 K p *rest"], new: Shaped[Array, "T 2 K *rest"], slots: Int32[Array, "T"]
) -> Shaped[Array, "P 2 K p *rest"]:
    page_size = array.shape[3]
    at = array.at[slots // page_size, :, :, slots % page_size]
    # A negative slot is outside, too, and must not count from the end.
    return at.set(new, mode="drop", wrap_negative_indices=False)
