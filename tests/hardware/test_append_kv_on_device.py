"""append_kv as it runs on an accelerator: what is kept, what is dropped, and that no pool is copied."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dequantized

from pallas_kernels import QuantizedPages, append_kv

pytestmark = pytest.mark.hardware

P, K, p, H = 64, 4, 64, 128
# Of the largest value in a vector: none, half a step of int8, half a step of 3 bits of mantissa.
ROUNDING = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "uint8": 2.0**-4}


def empty_pages(dtype: str) -> Any:
    if dtype in ("float32", "bfloat16"):
        return jnp.zeros((P, 2, K, p, H), dtype)
    return QuantizedPages(jnp.zeros((P, 2, K, p, H), dtype), jnp.zeros((P, 2, K, p), jnp.float32))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_tokens_are_kept_in_their_slots_without_a_copy(platform: str, dtype: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    given = jnp.dtype(dtype if dtype in ("float32", "bfloat16") else "bfloat16")
    k, v = rng.standard_normal((2, tokens, K, H)).astype(given)
    slots = rng.permutation(P * p)[:tokens].astype(np.int32)
    dropped = np.zeros(tokens, bool)
    if tokens > 3:
        slots[:3], dropped[:3] = [-1, P * p, 2**31 - 1], True

    pages = empty_pages(dtype)
    pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    append = functools.partial(append_kv, platform=platform)
    program = jax.jit(append, donate_argnums=0).lower(pages, k, v, slots).compile()
    assert program.memory_analysis().temp_size_in_bytes < pool_bytes / 4
    kept = dequantized(program(pages, k, v, slots)).transpose(0, 3, 1, 2, 4).reshape(P * p, 2, K, H)

    expected = np.zeros_like(kept)
    expected[slots[~dropped]] = np.stack([k, v], axis=1)[~dropped].astype(np.float64)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    assert np.all(np.abs(kept - expected) <= ROUNDING[dtype] * largest * (1 + 1e-4))
