"""Paged attention for a CPU in C++ (`pallas_kernels.native`): all cores, each page read once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention.contract import Pages, QuantizedPages


def paged_attention_native(
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
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. Takes float32 pages, and bfloat16 ones as uint16.

    `pallas_kernels.native.load` comes first.

    Raises:
        ValueError: a head dimension or a dtype that the kernel does not take.
    """
    if isinstance(pages, QuantizedPages):
        raise ValueError(
            f"the native kernel takes float32 and bfloat16 pages, got {pages.values.dtype} with scales"
        )
    if pages.shape[4] % 16:
        raise ValueError(f"the native kernel takes head dimensions that 16 divides, got {pages.shape[4]}")
    if pages.dtype == jnp.bfloat16:
        pages = jax.lax.bitcast_convert_type(pages, jnp.uint16)
    if pages.dtype not in (jnp.float32, jnp.uint16):
        raise ValueError(f"the native kernel takes float32 and bfloat16 pages, got {pages.dtype}")
    B, Q, N, _ = q.shape
    call = jax.ffi.ffi_call(
        "lamina_paged_attention",
        (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, Q, N), jnp.float32)),
    )
    o, lse = call(
        q.astype(jnp.float32),
        pages,
        block_tables,
        context_lens,
        page_index,
        q_positions,
        jnp.asarray(window, jnp.int32),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
    )
    return o, lse
