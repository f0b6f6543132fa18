"""Writing the keys and values of new tokens into KV pages.

Knows nothing of requests: the caller says in which slot each token goes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

__all__ = ["append_kv"]


def append_kv(
    pages: Shaped[Array, "P 2 K p H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, "T"],
) -> Shaped[Array, "P 2 K p H"]:
    """`pages` with k and v of T tokens kept in the given slots; the rest is unchanged.

    Where `pages` is donated to the program that calls this, XLA writes in place. A program that also reads
    the pages must append first and read the result (with the old context length if the new tokens are
    not to be seen): reading first makes XLA copy the pool.

    Args:
        pages: of the dtype of k and v, or uint16: the bits of a 16-bit dtype.
        k, v: of one dtype; no conversion takes place.
        slots: page * p + offset, each slot at most once; those outside 0 .. P p - 1 are dropped, which is
            how padding is written.

    Raises:
        ValueError: dtypes that differ.
    """
    page_size = pages.shape[3]
    kv = jnp.stack([k, v], axis=1)  # [T, 2, K, H]
    if pages.dtype == jnp.uint16 and kv.dtype.itemsize == 2:
        kv = jax.lax.bitcast_convert_type(kv, jnp.uint16)
    if kv.dtype != pages.dtype:
        raise ValueError(f"k and v are {kv.dtype}, but pages hold {pages.dtype}: convert k and v first")
    at = pages.at[slots // page_size, :, :, slots % page_size]
    # A negative slot is outside, too, and must not count from the end.
    return at.set(kv, mode="drop", wrap_negative_indices=False)
