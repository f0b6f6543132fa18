"""Paged attention as it is defined: gather every page, mask, softmax, in float32, for any platform.

The measure of the other readings, and what runs where no kernel is written. It reads whole block tables
into dense arrays, so its memory grows with B M.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention.contract import (
    Pages,
    first_visible,
    read_float32,
    slot_positions,
)


def paged_attention_reference(
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
    """See `pallas_kernels.paged_attention`."""
    B, Q, N, H = q.shape
    _, _, K, page_size, _ = pages.shape
    S = block_tables.shape[1] * page_size

    # [B, M, 2, K, p, H] -> [B, 2, K, S, H] with S = M p
    cached = read_float32(pages, block_tables, dtype)
    k, v = jnp.moveaxis(cached.transpose(0, 2, 3, 1, 4, 5).reshape(B, 2, K, S, H), 1, 0)

    positions = slot_positions(page_index, context_lens, page_size)  # [B, S]
    first = first_visible(q_positions, window)
    cached_here = positions < context_lens[:, None]
    visible = (positions[:, None, :] >= first[:, :, None]) & cached_here[:, None, :]  # [B, Q, S]
    # What no token sees may be NaN, and 0 x NaN is NaN.
    v = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], v, 0.0)

    groups = q.astype(jnp.float32).reshape(B, Q, K, N // K, H)
    scores = scale * jnp.einsum("BQKGH,BKSH->BQKGS", groups, k, precision=jax.lax.Precision.HIGHEST)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None, None, :], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    seen = jnp.isfinite(lse)[..., None]
    weights = jnp.exp(scores - jnp.where(seen, lse[..., None], 0.0))
    o = jnp.einsum("BQKGS,BKSH->BQKGH", weights, v, precision=jax.lax.Precision.HIGHEST)
    return o.reshape(B, Q, N, H), lse.reshape(B, Q, N)
