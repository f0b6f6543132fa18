"""Paged attention for a CPU in C++ (`pallas_kernels.native`): all cores, each page read once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention.contract import Pages, QuantizedPages
from pallas_kernels.paged_attention.taken import check_taken


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
    dtype: jnp.dtype,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. Takes float32, bfloat16 and quantised pages.

    `pallas_kernels.native.load` comes first.

    Raises:
        ValueError: a head dimension or a dtype that the kernel does not take.
    """
    check_taken("native", pages, dtype)
    stored, scales = _stored(pages)
    B, Q, N, _ = q.shape
    call = jax.ffi.ffi_call(
        "lamina_paged_attention",
        (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, Q, N), jnp.float32)),
    )
    o, lse = call(
        q.astype(jnp.float32),
        stored,
        scales,
        block_tables,
        context_lens,
        page_index,
        q_positions,
        jnp.asarray(window, jnp.int32),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
    )
    return o, lse


def _stored(pages: Pages) -> tuple[Shaped[Array, "P 2 K p H"], Float32[Array, "..."]]:
    """Pages as the kernel knows them, and their scales: of pages that have none, an empty array."""
    values, scales = pages if isinstance(pages, QuantizedPages) else (pages, jnp.zeros(0, jnp.float32))
    if values.dtype == jnp.bfloat16:
        values = jax.lax.bitcast_convert_type(values, jnp.uint16)
    if values.dtype == jnp.float8_e4m3fn:
        values = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return values, scales
