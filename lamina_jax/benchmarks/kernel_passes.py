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

from lamina_jax.ops import NO_WINDOW
from lamina_jax.pool.pages import storage_dtype
from pallas_kernels import Pages, QuantizedPages, paged_attention, split_plan

DTYPES = "float32", "bfloat16", "int8", "float8_e4m3fn"
MOST_CALLS = 1024
"""In a pass."""

Call = Callable[[jax.Array, jax.Array], jax.Array]
"""What a layer computes: q [B, N, H] and its block tables [B, M] to an output like q."""

Step = Callable[[jax.Array, Any, jax.Array, int], Call]
"""What a decode step computes once, of q, pages, context lengths [B] and M, to the call of every layer."""


@dataclass(frozen=True)
class Shape:
    """What is the same in every cell.

    Attributes:
        kv_heads, head_dim, page_size: of the pages, [P, 2, K, p, H].
    """

    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    @property
    def page_values(self) -> int:
        return 2 * self.kv_heads * self.page_size * self.head_dim

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
    """KV pages of one dtype.

    Attributes:
        mesh: of the devices that share the heads.
        pages: as an engine keeps them there, [P, 2, K, p, H]; see `lamina_jax.pool.pages.storage_dtype`.
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
    held = storage_dtype(dtype, devices[0].platform)
    if jnp.dtype(dtype).itemsize > 1:
        page: Any = numbers.astype(jnp.dtype(dtype)).view(held)
    else:
        values = np.clip(32 * numbers, -127, 127).astype(jnp.dtype(dtype)).view(held)
        page = QuantizedPages(jnp.asarray(values), jnp.full(size[:3], 1 / 32, jnp.float32))
    fill = jax.jit(
        lambda page: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_pages, *leaf.shape)), page),
        out_shardings=heads,
    )
    return Pool(shape, dtype, num_pages, mesh, fill(page))


def paged_step(dtype: str, platform: str) -> Step:
    """A call of `pallas_kernels.paged_attention`, as a decode step makes it."""
    attend = functools.partial(paged_attention, platform=platform)
    return functools.partial(_paged_step, attend, jnp.dtype(dtype))


def planned_step(dtype: str) -> Step:
    """The same of the GPU's kernel, whose split plan the step makes once for all layers."""

    def step(q: jax.Array, pages: Pages, context_lens: jax.Array, width: int) -> Call:
        lengths = context_lens, _places(context_lens, width), context_lens[:, None]
        plan = split_plan(q[:, None], pages, *lengths, NO_WINDOW, platform="gpu")
        attend = functools.partial(paged_attention, platform="gpu", plan=plan)
        return _paged_step(attend, jnp.dtype(dtype), q, pages, context_lens, width)

    return step


def empty_step(q: jax.Array, pages: Pages, context_lens: jax.Array, width: int) -> Call:
    """Calls that read nothing: what they cost is taken off the fixed cost of one that does."""
    return lambda q, tables: q + (tables[:, :1, None] + context_lens[:, None, None]).astype(q.dtype)


def _paged_step(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    dtype: jnp.dtype,
    q: jax.Array,
    pages: Pages,
    context_lens: jax.Array,
    width: int,
) -> Call:
    page_index, scale = _places(context_lens, width), q.shape[-1] ** -0.5

    def call(q: jax.Array, tables: jax.Array) -> jax.Array:
        where = tables, context_lens, page_index, context_lens[:, None], NO_WINDOW
        o, _ = attend(q[:, None], pages, *where, scale=scale, dtype=dtype)
        return o[:, 0].astype(q.dtype)

    return call


def _places(context_lens: jax.Array, width: int) -> jax.Array:
    """page_index [B, M], as the scheduler writes it for a worker that holds whole requests."""
    return jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (context_lens.shape[0], width))


def _calls(step: Step, q: jax.Array, pages: Pages, tables: jax.Array, context_lens: jax.Array) -> jax.Array:
    """One call for each of the tables [C, B, M]."""
    call = step(q, pages, context_lens, tables.shape[-1])
    last, _ = jax.lax.scan(lambda q, table: (call(q, table), None), q, tables)
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
