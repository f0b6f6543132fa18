"""Kernels over paged KV: a folder per kernel, with a plain-jnp reference and a reading per platform.

Imports jax and nothing of lamina_jax.
"""

from __future__ import annotations

from pallas_kernels.append_kv import append_kv, keep_stored, read_stored
from pallas_kernels.paged_attention import (
    NO_PAGE,
    Pages,
    QuantizedPages,
    SplitPlan,
    paged_attention,
    refusal,
    split_plan,
)

__all__ = [
    "NO_PAGE",
    "Pages",
    "QuantizedPages",
    "SplitPlan",
    "append_kv",
    "keep_stored",
    "paged_attention",
    "read_stored",
    "refusal",
    "split_plan",
]
