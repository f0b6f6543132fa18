"""The KV pages of a layer as arrays on a device: how they are stored, made and written.

Pages of 8 bits are two arrays, `QuantizedPages`, others one: here alone the two differ. Knows nothing of
requests, and of attention only what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from lamina_jax.pool.geometry import CacheGeometry
from pallas_kernels import Pages, QuantizedPages, append_kv


def pages_struct(geometry: CacheGeometry, sharding: Sharding) -> Any:
    """Shapes and dtypes of the pages of one layer, placed by `sharding`."""

    def placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(placed, jax.eval_shape(_zeros(geometry, sharding)))


def stored_struct(pages: Any, tokens: int) -> Any:
    """Shapes and dtypes of what such pages of one layer hold of some tokens: arrays [T, 2, K, ...]."""

    def of_tokens(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        _, two, heads, _, *rest = array.shape
        return jax.ShapeDtypeStruct((tokens, two, heads, *rest), array.dtype, sharding=array.sharding)

    return jax.tree.map(of_tokens, pages)


def make_pages(geometry: CacheGeometry, sharding: Sharding) -> list[Pages]:
    """The pages of every layer, all zeros."""
    made = jax.jit(_zeros(geometry, sharding), out_shardings=sharding).lower().compile()
    return [made() for _ in range(geometry.num_layers)]


def keep_kv(
    pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array, *, dtype: str, platform: str | None
) -> Pages:
    """`pages` with k and v[T K H], of any float dtype, rounded to the `dtype` of the pages and kept in
    slots[T] by the kernels of `platform`; see `append_kv`."""
    if not isinstance(pages, QuantizedPages):
        k, v = k.astype(dtype), v.astype(dtype)
    return append_kv(pages, k, v, slots, platform=platform)


def storage_dtype(dtype: str, platform: str) -> jnp.dtype:
    """How values are held. Floats of 16 bits are their bits on a CPU, where XLA gathers floats slowly;
    those of 8 bits are on every device, since few know the type: whoever reads them may."""
    if dtype == "float8_e4m3fn":
        return jnp.dtype("uint8")
    return jnp.dtype("uint16") if dtype == "bfloat16" and platform == "cpu" else jnp.dtype(dtype)


def _zeros(g: CacheGeometry, sharding: Sharding) -> Callable[[], Pages]:
    shape = (g.num_pages, 2, g.num_kv_heads, g.page_size, g.head_dim)
    device: Any = next(iter(sharding.device_set))
    dtype = storage_dtype(g.dtype, device.platform)

    def zeros() -> Pages:
        values = jnp.zeros(shape, dtype)
        return QuantizedPages(values, jnp.zeros(shape[:-1], jnp.float32)) if g.is_quantized else values

    return zeros
