"""Paged attention for a TPU: a Pallas (Mosaic) kernel that reads each visited page once.

Here is what surrounds the kernel: which shapes it takes, how the work is cut into items, and the layouts.
The body is `tpu_kernel.py`, the copies of pages `tpu_ring.py`, the sizes `tpu_plan.py`.

Two layouts are not what one would expect. Where few query rows meet a KV head, h heads share the 8 rows of
a tile: their queries stand in a block diagonal [h G, h H] and their keys side by side, so that one product
scores them all. And pages whose H does not fill the lanes XLA keeps with the tokens in the lanes, if those
do: the kernel takes them so, for any other order would be a copy of the whole pool.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention.contract import (
    Pages,
    QuantizedPages,
    first_visible,
    fold_queries,
    output_like,
    unfold_queries,
    visited_entries,
)
from pallas_kernels.paged_attention.taken import check_taken
from pallas_kernels.paged_attention.tpu_kernel import LOG2_E, Scoring, attend_item
from pallas_kernels.paged_attention.tpu_plan import LANES, Blocks, Chip, choose_blocks, this_chip
from pallas_kernels.paged_attention.tpu_ring import Work

# Of the one MiB of scalar memory, what the tables may take.
_TABLE_BYTES = 768 << 10


def paged_attention_tpu(
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
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """See `pallas_kernels.paged_attention`. `interpret` goes to `pl.pallas_call`; `chip` is what the sizes
    are chosen for, by default the one that the program is traced for.

    Raises:
        ValueError: a dtype, a head dimension or a page size that the kernel does not take.
    """
    check_taken("tpu", pages)
    B, M = block_tables.shape
    call = functools.partial(
        _paged_attention,
        pages=pages,
        window=window,
        scale=scale,
        softcap=softcap,
        chip=chip or this_chip(),
        interpret=interpret,
    )
    # Requests whose tables do not fit into scalar memory together go one part after another.
    at_once = max(1, _TABLE_BYTES // (2 * 4 * M))
    parts = [
        call(
            q[i : i + at_once],
            *(x[i : i + at_once] for x in (block_tables, context_lens, page_index, q_positions)),
        )
        for i in range(0, B, at_once)
    ]
    if len(parts) == 1:
        return parts[0]
    o, lse = zip(*parts, strict=True)
    return jnp.concatenate(o), jnp.concatenate(lse)


def _paged_attention(
    q: Float[Array, "B Q N H"],
    block_tables: Int32[Array, "B M"],
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    *,
    pages: Pages,
    window: Int32[Array, ""] | int,
    scale: float,
    softcap: float | None,
    chip: Chip,
    interpret: Any,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    stored = tuple(pages) if isinstance(pages, QuantizedPages) else (pages,)
    B, Q, N, H = q.shape
    _, _, K, page_size, _ = pages.shape
    G, M = N // K, block_tables.shape[1]
    tokens_in_lanes = H % LANES != 0
    blocks = choose_blocks(
        chip,
        Q=Q,
        G=G,
        K=K,
        p=page_size,
        H=H,
        entries=M,
        itemsize=stored[0].dtype.itemsize,
    )
    items = _cut(q, q_positions, window, context_lens, page_index, page_size, blocks)
    per_core = items.starts.shape[0] // blocks.cores

    work = Work(
        entries=M,
        items_per_request=-(-Q // blocks.tokens),
        items_per_core=per_core,
        pages=blocks.pages,
        page_size=page_size,
        depth=blocks.depth,
        heads=blocks.heads,
        head_rows=blocks.tokens * G,
        fp8=chip.fp8,
        tokens_in_lanes=tokens_in_lanes,
    )
    scoring = Scoring(scale=scale * LOG2_E, softcap=None if softcap is None else softcap * LOG2_E)
    rows = _share_rows(fold_queries(items.q, K).astype(_product_dtype(stored[0])), blocks)
    row_first = _rows_of_groups(jnp.repeat(items.first, G, axis=1), blocks)[..., None]
    if tokens_in_lanes:
        stored = (stored[0].swapaxes(3, 4), *stored[1:])

    groups, R, width = rows.shape[1:]
    turn = blocks.pages * page_size
    buffers = [
        pltpu.VMEM((blocks.depth, 2, K, *((H, turn) if tokens_in_lanes else (turn, H))), stored[0].dtype)
    ]
    buffers += [
        pltpu.VMEM((blocks.depth, blocks.pages, *scales.shape[1:]), scales.dtype) for scales in stored[1:]
    ]

    def per_item(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda core, i, *_: (core * per_core + i, *(0,) * len(shape)))

    o, lse = pl.pallas_call(
        functools.partial(attend_item, work=work, scoring=scoring, quantized=len(stored) > 1),
        out_shape=[
            output_like(rows, (rows.shape[0], groups, R, width)),
            output_like(rows, (rows.shape[0], groups, R, LANES)),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(blocks.cores, per_core),
            in_specs=[
                per_item(groups, R, width),
                per_item(R, 1),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in stored),
            ],
            out_specs=[per_item(groups, R, width), per_item(groups, R, LANES)],
            scratch_shapes=[
                *buffers,
                pltpu.VMEM((groups, R, LANES), jnp.float32),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.SemaphoreType.DMA((blocks.depth,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem_bytes * 3 // 4
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        _entries(block_tables, blocks.pages),
        _entries(page_index, blocks.pages),
        context_lens,
        jnp.pad(items.starts, (0, 1)),
        jnp.pad(items.stops, (0, 1)),
        _upcoming(items, blocks.cores),
        rows,
        row_first,
        *stored,
    )
    o, lse = _own_rows(o, lse[..., :1], blocks, G)
    return _whole(unfold_queries(o, blocks.tokens), B, Q), _whole(
        unfold_queries(lse[..., 0], blocks.tokens), B, Q
    )


class _Items(NamedTuple):
    """The work in pieces of T query tokens of one request: I of them, a multiple of cores."""

    q: Float[Array, "I T N H"]
    first: Int32[Array, "I T"]
    starts: Int32[Array, " I"]
    stops: Int32[Array, " I"]


def _cut(
    q: Float[Array, "B Q N H"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    page_size: int,
    blocks: Blocks,
) -> _Items:
    """Filled up with tokens that see nothing, which nobody reads, and items that visit nothing."""
    B, Q = q_positions.shape
    per_request = -(-Q // blocks.tokens)
    more_tokens = (0, per_request * blocks.tokens - Q)
    more_items = (0, -(B * per_request) % blocks.cores)
    # The last position's, so that they ask for no page that no other token wants.
    positions = jnp.pad(q_positions, ((0, 0), more_tokens), mode="edge")
    first = first_visible(positions, window).reshape(-1, blocks.tokens)
    q = jnp.pad(q, ((0, 0), more_tokens, (0, 0), (0, 0))).reshape(-1, blocks.tokens, *q.shape[2:])
    starts, stops = visited_entries(
        jnp.repeat(page_index, per_request, axis=0), jnp.repeat(context_lens, per_request), first, page_size
    )
    return _Items(
        *(jnp.pad(x, (more_items, *((0, 0),) * (x.ndim - 1))) for x in (q, first, starts, stops)),
    )


def _upcoming(items: _Items, cores: int) -> Int32[Array, " U"]:
    """See `tpu_ring.Tables`."""
    visits = (items.starts < items.stops).reshape(cores, -1)
    per_core = visits.shape[1]
    numbers = jnp.where(visits, jnp.arange(per_core, dtype=jnp.int32), per_core)
    first = jax.lax.cummin(numbers, axis=1, reverse=True)
    return jnp.pad(first, ((0, 0), (0, 1)), constant_values=per_core).reshape(-1)


def _entries(table: Int32[Array, "B M"], beyond: int) -> Int32[Array, "E"]:
    """A table as scalar memory holds it, with entries that a last turn may look at beyond its end."""
    return jnp.pad(table.reshape(-1), (0, beyond))


def _share_rows(rows: Float[Array, "I K r H"], blocks: Blocks) -> Float[Array, "I J R C"]:
    """h heads in the rows of one: block diagonal, row i r + j is row j of head i."""
    items, K, r, H = rows.shape
    h = blocks.heads
    own = jnp.eye(h, dtype=rows.dtype)[:, None, :, None]
    diagonal = rows.reshape(items, K // h, h, r, 1, H) * own[None, None]
    diagonal = diagonal.reshape(items, K // h, h * r, h * H)
    return jnp.pad(diagonal, ((0, 0), (0, 0), (0, blocks.rows - h * r), (0, 0)))


def _rows_of_groups(x: Int32[Array, "I r"], blocks: Blocks) -> Int32[Array, "I R"]:
    """What every head's rows share, as `_share_rows` lays them."""
    return jnp.pad(jnp.tile(x, (1, blocks.heads)), ((0, 0), (0, blocks.rows - blocks.heads * x.shape[1])))


def _own_rows(
    o: Float32[Array, "I J R C"], lse: Float32[Array, "I J R 1"], blocks: Blocks, G: int
) -> tuple[Float32[Array, "I K r H"], Float32[Array, "I K r 1"]]:
    """The inverse of `_share_rows`: a row's weights met the values of all h heads, its own are wanted."""
    items, groups, _, width = o.shape
    h, r = blocks.heads, blocks.tokens * G
    o = o[:, :, : h * r].reshape(items, groups, h, r, h, width // h)
    o = jnp.stack([o[:, :, i, :, i] for i in range(h)], axis=2)
    return o.reshape(items, groups * h, r, width // h), lse[:, :, : h * r].reshape(items, groups * h, r, 1)


def _whole(pieces: Float32[Array, "I T ..."], B: int, Q: int) -> Float32[Array, "B Q ..."]:
    """The inverse of `_cut`."""
    _, T, *rest = pieces.shape
    per_request = -(-Q // T)
    return pieces[: B * per_request].reshape(B, per_request * T, *rest)[:, :Q]


def _product_dtype(stored: Any) -> Any:
    return jnp.float32 if stored.dtype == jnp.float32 else jnp.bfloat16
