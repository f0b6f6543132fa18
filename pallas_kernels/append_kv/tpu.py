"""Writing rows of new tokens into the pages of a TPU, in place.

A TPU copies whole tiles: 8 to 32 tokens of every head where the tokens are in sublanes, 128 where they are
in lanes. So a tile is read, the new rows are put between the old ones, and it is written back, several tiles
at a time. The tokens are sorted by slot first: each tile is visited once, and no two copies meet.

Knows nothing of keys, values and scales.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.paged_attention.tpu_plan import LANES, SUBLANES, Chip, round_up, this_chip

# Up to so many tokens of several heads XLA writes in place what has its tokens in sublanes of 16 or 32 bits.
# From 1,024 on, and anything else, it copies to another layout and back.
_XLA_TOKENS = 512
# Tables of so many tokens leave most of the scalar memory free.
_MOST_TOKENS = 4096
# Tiles read ahead, and as many that may still be on their way back.
_MOST_AHEAD = 4


def must_put_rows(pages: Shaped[Array, "P 2 K p *rest"], tokens: int) -> bool:
    """Whether XLA would copy all pages, or scales, to write so many tokens."""
    is_plain = pages.dtype.itemsize > 1 and pages.shape[2] > 1 and not _tokens_in_lanes(pages)
    return not is_plain or tokens > _XLA_TOKENS


def put_rows(
    pages: Shaped[Array, "P 2 K p *rest"],
    rows: Shaped[Array, "T 2 K *rest"],
    slots: Int32[Array, "T"],
    *,
    chip: Chip | None = None,
    interpret: Any = False,
) -> Shaped[Array, "P 2 K p *rest"]:
    """`pages`, or their scales, with the rows of T tokens in the given slots, as `append_kv` counts them.

    Those of a slot outside are dropped. The tokens of a page fill whole tiles: see `paged_attention.refusal`.
    `interpret` goes to `pl.pallas_call`; `chip` is what the sizes are chosen for, by default the one that the
    program is traced for.
    """
    in_lanes, stored = _tokens_in_lanes(pages), pages
    if pages.ndim == 5:  # the heads of K and V alike
        stored, rows = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (pages, rows))
        stored = stored.swapaxes(2, 3) if in_lanes else stored
    axis = 2 if in_lanes else 1
    work = _work(chip or this_chip(), stored, axis)
    for i in range(0, len(slots), work.most_tokens):
        some = slice(i, i + work.most_tokens)
        stored = _put(stored, rows[some], slots[some], work, interpret)
    if pages.ndim == 5 and in_lanes:
        stored = stored.swapaxes(2, 3)
    return stored.reshape(pages.shape)


def _tokens_in_lanes(pages: Shaped[Array, "P 2 K p *rest"]) -> bool:
    """As XLA keeps pages. Scales that do not fill the lanes it copies to have it so, and back."""
    return pages.ndim == 4 or pages.shape[4] % LANES != 0


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Sizes that the kernel is specialised for.

    Attributes:
        axis: of the tokens in a tile [C, A, Z]: 1 or 2.
        page_size: p.
        tile: tokens that are copied together.
        block: tokens of the rows that are moved to their places in a tile together.
        ahead: tiles that are read ahead; the ring holds twice as many.
        most_tokens: of one call.
        vmem_bytes: that it may fill.
    """

    axis: int
    page_size: int
    tile: int
    block: int
    ahead: int
    most_tokens: int
    vmem_bytes: int


def _work(chip: Chip, stored: Shaped[Array, "P C A Z"], axis: int) -> _Work:
    """Sizes that let the ring take a quarter of VMEM, and the rows of one call another."""
    room = chip.vmem_bytes // 4
    C, *plane = stored.shape[1:]
    page_size, other = stored.shape[1 + axis], plane[2 - axis]
    whole = (SUBLANES * 4 // stored.dtype.itemsize, LANES)
    tile = whole[axis - 1] if page_size % whole[axis - 1] == 0 else page_size
    block = round_up(tile, whole[axis - 1])
    token_bytes = C * round_up(other, whole[2 - axis]) * stored.dtype.itemsize
    return _Work(
        axis=axis,
        page_size=page_size,
        tile=tile,
        block=block,
        ahead=max(1, min(_MOST_AHEAD, room // (2 * block * token_bytes))),
        most_tokens=max(block, min(_MOST_TOKENS, room // token_bytes)),
        vmem_bytes=3 * room,
    )


class _Tables(NamedTuple):
    """Scalar memory: T tokens sorted by slot, the dropped ones last.

    A run is some neighbours in one tile of the pages that are neighbours in one block of the rows, too.

    Attributes:
        slots: int32[T].
        first: int32[T + 1]; the first token of each tile that is visited; then how many tokens are kept.
        stops: int32[T]; the token behind the run that begins with a token.
        count: int32[1]; how many tiles are visited.
    """

    slots: Any
    first: Any
    stops: Any
    count: Any


def _sorted(slots: Int32[Array, "T"], num_slots: int, work: _Work) -> tuple[Int32[Array, "T"], _Tables]:
    """The order of the tokens, and the tables of the tokens in that order."""
    token = jnp.arange(len(slots), dtype=jnp.int32)
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    slots, order = jax.lax.sort_key_val(slots, token)
    kept, before = slots < num_slots, jnp.roll(slots, 1)
    count = jnp.sum(kept, dtype=jnp.int32)
    starts_tile = kept & ((token == 0) | (slots // work.tile != before // work.tile))
    starts_run = starts_tile | (slots != before + 1) | (token % work.block == 0)
    first = jnp.sort(jnp.where(starts_tile, token, count))
    stops = jax.lax.cummin(jnp.where(starts_run & kept, token, count), reverse=True)
    return order, _Tables(
        slots,
        jnp.append(first, count),
        jnp.append(stops[1:], count),
        jnp.sum(starts_tile, dtype=jnp.int32)[None],
    )


def _put(
    stored: Shaped[Array, "P C A Z"],
    rows: Shaped[Array, "T C *rest"],
    slots: Int32[Array, "T"],
    work: _Work,
    interpret: Any,
) -> Shaped[Array, "P C A Z"]:
    order, tables = _sorted(slots, stored.shape[0] * work.page_size, work)
    rows = jnp.pad(rows[order], ((0, -len(slots) % work.block), (0, 0), (0, 0)))
    rows = jnp.moveaxis(rows, 0, work.axis)
    tile = list(stored.shape[1:])
    tile[work.axis] = work.tile
    depth, anywhere = 2 * work.ahead, pl.BlockSpec(memory_space=pl.ANY)
    out: Shaped[Array, "P C A Z"] = pl.pallas_call(
        functools.partial(_put_tiles, work=work),
        out_shape=jax.eval_shape(lambda x: x, stored),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((depth, *tile), stored.dtype),
                pltpu.SemaphoreType.DMA((depth,)),
                pltpu.SemaphoreType.DMA((depth,)),
            ],
        ),
        input_output_aliases={len(tables) + 1: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=work.vmem_bytes),
        interpret=interpret,
        name="append_kv",
    )(*tables, rows, stored)
    return out


def _put_tiles(*refs: Any, work: _Work) -> None:
    """Refs: the tables; rows [C ..] in VMEM, T filled up to whole blocks; the pages [P C A Z] in HBM, which
    are the output, too; the ring of tiles, and of each a semaphore of its way here and one of its way back.
    """
    tables, (rows, _, pages, tiles, arrived, returned) = _Tables(*refs[:4]), refs[4:]
    depth, count = 2 * work.ahead, tables.count[0]

    def copy(i: Array, *, back: bool) -> Any:
        slot, place = tables.slots[tables.first[i]], jax.lax.rem(i, depth)
        here, there = tiles.at[place], pages.at[jax.lax.div(slot, work.page_size)]
        if work.tile < work.page_size:
            there = there.at[_within(jax.lax.rem(slot, work.page_size), work.tile, work.axis)]
        if back:
            return pltpu.make_async_copy(here, there, returned.at[place])
        return pltpu.make_async_copy(there, here, arrived.at[place])

    def read(i: Array) -> None:
        @pl.when((i >= depth) & (i < count))
        def _() -> None:
            copy(i - depth, back=True).wait()

        @pl.when(i < count)
        def _() -> None:
            copy(i, back=False).start()

    def visit(i: Array, _: None) -> None:
        read(i + work.ahead)
        copy(i, back=False).wait()
        put = functools.partial(_put_run, tables, rows, tiles.at[jax.lax.rem(i, depth)], work)
        jax.lax.while_loop(lambda token: token < tables.first[i + 1], put, tables.first[i])
        copy(i, back=True).start()

    def finish(i: Array, _: None) -> None:
        copy(i, back=True).wait()

    jax.lax.fori_loop(0, work.ahead, lambda i, _: read(i), None)
    jax.lax.fori_loop(0, count, visit, None)
    jax.lax.fori_loop(jnp.maximum(count - depth, 0), count, finish, None)


def _put_run(tables: _Tables, rows: Any, tile: Any, work: _Work, token: Array) -> Array:
    """Puts the run that begins with this token into its tile [C A Z]; the token behind it."""
    block, axis, stop = work.block, work.axis, tables.stops[token]
    at = jax.lax.rem(tables.slots[token], work.tile)
    shift = jax.lax.rem(at - jax.lax.rem(token, block) + block, block)
    index = jax.lax.broadcasted_iota(jnp.int32, tile.shape[1:], axis - 1)
    is_new = (index >= at) & (index < at + stop - token)
    # In 32 bits, because not every TPU selects among fewer.
    wide = jnp.int32 if tile.dtype == jnp.uint8 else jnp.float32
    source = rows.at[_within(token, block, axis)]

    def put(head: Array, _: None) -> None:
        moved = pltpu.roll(source[head].astype(wide), shift, axis - 1)
        moved = jax.lax.slice_in_dim(moved, 0, work.tile, axis=axis - 1)
        tile[head] = jnp.where(is_new, moved, tile[head].astype(wide)).astype(tile.dtype)

    jax.lax.fori_loop(0, tile.shape[0], put, None)
    return stop


def _within(token: Array, size: int, axis: int) -> tuple[Any, ...]:
    """Of [C, A, Z] the piece of this size, along this axis, that holds a token."""
    start = pl.multiple_of(jax.lax.div(token, size) * size, size)
    return tuple(pl.ds(start, size) if i == axis else slice(None) for i in range(3))
