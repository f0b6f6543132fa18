"""What `bench kernels` times: passes over a pool of KV pages, each a row of calls of paged attention.

The calls of a pass are one program, in which each call's output is the next one's query, so that nothing of
the host's stands between them. They read different pages, in random order, and a pass reads more than caches
hold before it reads a page again: one hot block table would flatter.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Pages, QuantizedPages, paged_attention

DTYPES = "float32", "bfloat16", "int8", "float8_e4m3fn"
MOST_CALLS = 1024
"""In a pass."""

Step = Callable[[jax.Array, Any, jax.Array, jax.Array], jax.Array]
"""One call: q [B, N, H], pages, block tables [B, M] and context lengths [B] to an output like q."""


@dataclass(frozen=True)
class Shape:
    """What is the same in every cell.

    Attributes:
        kv_heads, head_dim, page_size: of the pages, [P, 2, K, p, H].
    """

    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    def token_bytes(self, dtype: str) -> int:
        """K and V of one token, with the scales of a quantised dtype."""
        itemsize = jnp.dtype(dtype).itemsize
        return 2 * self.kv_heads * (self.head_dim * itemsize + (4 if itemsize == 1 else 0))


class Cell(NamedTuple):
    """So many requests of one new token, the cached tokens of each, and query heads per KV head."""

    batch: int
    context: int
    group: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, G {self.group}"

    def pages(self, page_size: int) -> int:
        return self.batch * -(-self.context // page_size)


@dataclass(frozen=True)
class Pass:
    """A row of calls that can be timed.

    Attributes:
        name: of what computes it.
        dtype: of the KV cache.
        calls: in a pass; num_bytes: of KV that a call reads.
        run: run so many passes one after the other and wait for the end.
    """

    name: str
    dtype: str
    calls: int
    num_bytes: int
    run: Callable[[int], object]

    def seconds_per_call(self, passes: int) -> float:
        started = time.perf_counter()
        self.run(passes)
        return (time.perf_counter() - started) / (passes * self.calls)


@dataclass(frozen=True)
class Pool:
    """KV pages of one dtype over `devices`, which share the heads.

    Attributes:
        pages: as stored: on a CPU 16-bit floats and float8 as the bits of integers.
    """

    shape: Shape
    dtype: str
    num_pages: int
    mesh: Mesh
    pages: Any

    def make_pass(self, name: str, cell: Cell, step: Step) -> Pass:
        """Compile the calls of `step` over this pool's pages."""
        tables = block_tables(cell, self.num_pages, self.shape.page_size)
        heads, everywhere = PartitionSpec(None, "kv"), PartitionSpec()
        page_heads = PartitionSpec(None, None, "kv")
        calls = functools.partial(_calls, step)
        if self.mesh.size > 1:
            in_specs = heads, page_heads, everywhere, everywhere
            calls = jax.shard_map(calls, mesh=self.mesh, in_specs=in_specs, out_specs=heads)
        q = np.ones((cell.batch, cell.group * self.shape.kv_heads, self.shape.head_dim), _float(self.dtype))
        place = functools.partial(NamedSharding, self.mesh)
        first = jax.device_put(q, place(heads))
        where = jax.device_put((tables, np.full(cell.batch, cell.context, np.int32)), place(everywhere))
        program = jax.jit(calls).lower(first, self.pages, *where).compile()

        def run(passes: int) -> object:
            q = first
            for _ in range(passes):
                q = program(q, self.pages, *where)
            return jax.block_until_ready(q)

        num_bytes = cell.batch * cell.context * self.shape.token_bytes(self.dtype)
        return Pass(name, self.dtype, len(tables), num_bytes, run)


def make_pool(shape: Shape, dtype: str, num_pages: int, devices: Sequence[jax.Device]) -> Pool:
    """Pages of random numbers, the same in every page."""
    mesh = Mesh(np.array(devices), ("kv",))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "kv"))
    size = (2, shape.kv_heads, shape.page_size, shape.head_dim)
    numbers = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    bits = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8} if devices[0].platform == "cpu" else {}
    if jnp.dtype(dtype).itemsize > 1:
        page: Any = numbers.astype(jnp.dtype(dtype)).view(bits.get(dtype, jnp.dtype(dtype)))
    else:
        values = np.clip(32 * numbers, -127, 127).astype(jnp.dtype(dtype))
        scales = np.full(size[:3], 1 / 32, np.float32)
        page = QuantizedPages(jnp.asarray(values.view(bits.get(dtype, values.dtype))), jnp.asarray(scales))
    fill = jax.jit(
        lambda page: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_pages, *leaf.shape)), page),
        out_shardings=heads,
    )
    return Pool(shape, dtype, num_pages, mesh, fill(page))


def paged_step(dtype: str, platform: str | None) -> Step:
    """A call of `pallas_kernels.paged_attention`, as a decode step makes it."""

    def step(q: jax.Array, pages: Pages, tables: jax.Array, context_lens: jax.Array) -> jax.Array:
        page_index = jnp.broadcast_to(jnp.arange(tables.shape[1], dtype=jnp.int32), tables.shape)
        o, _ = paged_attention(
            q[:, None],
            pages,
            tables,
            context_lens,
            page_index,
            context_lens[:, None],
            2**30,
            scale=q.shape[-1] ** -0.5,
            dtype=jnp.dtype(dtype),
            platform=platform,
        )
        return o[:, 0].astype(q.dtype)

    return step


def empty_step(q: jax.Array, pages: Pages, tables: jax.Array, context_lens: jax.Array) -> jax.Array:
    """What a call costs that reads nothing: to be taken off the fixed cost of one that does."""
    return q + (tables[:, :1, None] + context_lens[:, None, None]).astype(q.dtype)


def _calls(step: Step, q: jax.Array, pages: Pages, tables: jax.Array, context_lens: jax.Array) -> jax.Array:
    """One call for each of the tables [C, B, M]."""
    last, _ = jax.lax.scan(lambda q, table: (step(q, pages, table, context_lens), None), q, tables)
    return last


def block_tables(cell: Cell, num_pages: int, page_size: int) -> np.ndarray:
    """As many as the pool has pages for, [C, B, M]; no page stands twice in them."""
    needed = cell.pages(page_size)
    calls = min(MOST_CALLS, num_pages // needed)
    order = np.random.default_rng(1).permutation(num_pages)[: calls * needed]
    return order.reshape(calls, cell.batch, -1).astype(np.int32)


def _float(dtype: str) -> jnp.dtype:
    """Of the queries: the engine computes in bfloat16 where the cache is quantised."""
    return jnp.dtype("float32" if dtype == "float32" else "bfloat16")
