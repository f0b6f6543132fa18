"""The paged attention that JAX ships for GPU and for TPU, as a column of `bench kernels`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lamina_jax.benchmarks.kernel_passes import Call, Cell, Pass, Pool

NAME = "jax"
GPU_BLOCK_TOKENS = 128
"""Read at a time, in two stages: more do not fit into an H100's shared memory."""


def make_pass(pool: Pool, cell: Cell) -> Pass:
    """Its calls over as many pages, in the layout that it reads: K and V apart, [K, P, p, H].

    Raises:
        ImportError: this JAX ships none for the pool's platform.
    """
    step = {"gpu": _gpu_step, "tpu": _tpu_step}[pool.mesh.devices.flat[0].platform]
    page = pool.pages[0]  # [2, K, p, H]
    size = (pool.shape.kv_heads, pool.num_pages, *page.shape[2:])
    fill = jax.jit(lambda page: tuple(jnp.broadcast_to(heads[:, None], size) for heads in page))
    return replace(pool, pages=fill(page)).make_pass(NAME, cell, step)


def _gpu_step(q: jax.Array, pages: Any, context_lens: jax.Array, width: int) -> Call:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    splits = math.gcd(width, 16)
    block = math.gcd(width // splits, max(1, GPU_BLOCK_TOKENS // pages[0].shape[2]))
    attend = partial(paged_attention, k_splits=splits, pages_per_compute_block=block)
    return lambda q, tables: attend(q, *pages, tables, context_lens)


def _tpu_step(q: jax.Array, pages: Any, context_lens: jax.Array, width: int) -> Call:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    attend = partial(paged_attention, pages_per_compute_block=math.gcd(width, 16))
    return lambda q, tables: attend(q, *pages, context_lens, tables)
