"""Which pages a platform's kernels take: asked before a program is made, and by the kernels themselves."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.contract import Pages, QuantizedPages
from pallas_kernels.paged_attention.tpu_plan import LANES

_TPU_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "uint8")
# Of the tokens of a page, by bytes of a value: whole tiles, of 8 bits two.
_TPU_TOKENS = {4: 8, 2: 16, 1: 64}


def refusal(platform: str | None, dtype: DTypeLike, page_size: int, head_dim: int) -> str:
    """Why this platform's reading of `paged_attention` does not take pages [P, 2, K, p, H]; "" where it does.

    Args:
        platform: one of `PLATFORMS`, or None.
        dtype: of the values as they are held, or what the bits of them mean.
    """
    if platform == "tpu":
        return _refused_on_tpu(jnp.dtype(dtype), page_size, head_dim)
    if platform == "native":
        return _refused_by_native(jnp.dtype(dtype), head_dim)
    return ""


def check_taken(platform: str, pages: Pages, dtype: DTypeLike | None = None) -> None:
    """Raises the `refusal` of these pages as a ValueError. `dtype`: what they hold, if not their own."""
    stored = pages.values if isinstance(pages, QuantizedPages) else pages
    if why := refusal(platform, stored.dtype if dtype is None else dtype, *stored.shape[3:]):
        raise ValueError(why)


def _refused_on_tpu(dtype: jnp.dtype, page_size: int, head_dim: int) -> str:
    if dtype.name not in _TPU_DTYPES:
        return f"on a tpu pages must be {', '.join(_TPU_DTYPES)}, got {dtype}"
    if page_size % (multiple := _TPU_TOKENS[dtype.itemsize]):
        return (
            f"page size {page_size} is no multiple of {multiple}, which {dtype} pages need on a tpu: choose "
            "one that is, such as 64 or 128"
        )
    if head_dim % LANES and page_size % LANES:
        return (
            f"head dimension {head_dim} and page size {page_size}: on a tpu one must be a multiple of "
            f"{LANES}, the lanes of a tile, or every call copies all pages: choose page size {LANES}"
        )
    if head_dim % 16:
        return (
            f"head dimension {head_dim} is no multiple of 16, which a tpu needs: pad pages and q, or use "
            "platform=None, which takes any"
        )
    return ""


def _refused_by_native(dtype: jnp.dtype, head_dim: int) -> str:
    if head_dim % 16:
        return f"the native kernel takes head dimensions that 16 divides, got {head_dim}"
    return "the native kernel takes no float16 pages: use platform='cpu'" if dtype == jnp.float16 else ""
