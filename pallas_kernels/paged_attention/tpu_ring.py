"""Which pages the TPU kernel visits, and the ring of VMEM buffers that they come into.

A turn is some pages of one work item. Copies are started in the order of the turns, several ahead and beyond
the end of an item, so that only the first turn of a call waits for a whole copy. Knows nothing of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention.contract import NO_PAGE


class Tables(NamedTuple):
    """Scalar memory: which pages each of I items visits, in what order.

    Attributes:
        block_table, page_index: int32[B M + pages]; entries of all requests, then some never visited.
        context_lens: int32[B].
        starts, stops: int32[I + 1]; item w visits the entries starts[w] <= m < stops[w] of its request.
        upcoming: int32[cores (I / cores + 1)]; for the i-th item of a core, the number (of that core's) of
            the first at or after it that visits any page; I / cores if there is none.
    """

    block_table: Any
    page_index: Any
    context_lens: Any
    starts: Any
    stops: Any
    upcoming: Any


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes that the kernel is specialised for.

    Attributes:
        entries: M.
        items_per_request: I / B.
        items_per_core: I / cores.
        pages: that one turn brings.
        page_size: p.
        depth: turns that the ring holds.
        heads: KV heads that share the rows of a product.
        head_rows: rows of each of them.
        fp8: the 8-bit float that products take as it is, or None.
        tokens_in_lanes: pages are [2, K, H, p], not [2, K, p, H].
    """

    entries: int
    items_per_request: int
    items_per_core: int
    pages: int
    page_size: int
    depth: int
    heads: int
    head_rows: int
    fp8: DTypeLike | None
    tokens_in_lanes: bool


class _Item(NamedTuple):
    row: Int32[Array, ""]  # of the tables, where its request's entries begin
    start: Int32[Array, ""]
    stop: Int32[Array, ""]
    context_len: Int32[Array, ""]


class Ring:
    """The buffers, as the item of this grid step sees them.

    The cursor, int32[3] in scalar memory, lasts from step to step: the item (a number of this core's) and the
    entry that are copied next, and how many turns were taken.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        work: Work,
        pages: Sequence[Any],
        buffers: Sequence[Any],
        cursor: Any,
        arrived: Any,
    ):
        self._tables, self._work = Tables(*tables), work
        self._pages, self._buffers, self._cursor, self._arrived = pages, buffers, cursor, arrived
        self._core, step = pl.program_id(0), pl.program_id(1)
        self.item = self._item(step)

        @pl.when(step == 0)
        def _() -> None:
            cursor[2] = 0
            self._move_to(0)
            jax.lax.fori_loop(0, work.depth - 1, lambda slot, _: self._start_next(slot), None)

    def take(self, entry: Int32[Array, ""]) -> Int32[Array, ""]:
        """The slot that holds the turn from `entry` on, once it has come; starts what there is room for."""
        taken, depth = self._cursor[2], self._work.depth
        self._cursor[2] = taken + 1
        self._start_next(jax.lax.rem(taken + (depth - 1), depth))
        slot = jax.lax.rem(taken, depth)
        self._each_copy(self.item, entry, slot, lambda copy: copy.wait())
        return slot

    def positions(self, entry: Int32[Array, ""], rows: int) -> Int32[Array, "R S"]:
        """The position in its request of each token of a turn; beyond every context where no page came."""
        work, item = self._work, self.item
        token = jax.lax.broadcasted_iota(jnp.int32, (rows, work.pages * work.page_size), 1)
        offset = jnp.zeros_like(token)
        for i in range(work.pages):
            place = self._tables.page_index[item.row + entry + i] - i
            of_page = jnp.where(entry + i < item.stop, place * work.page_size, NO_PAGE)
            offset = jnp.where(token >= i * work.page_size, of_page, offset)
        return offset + token

    def cached(self, entry: Int32[Array, ""]) -> Int32[Array, ""]:
        """How many tokens of an item's last turn lie within the context: what follows them does not."""
        work, item = self._work, self.item
        last = item.stop - 1
        position = self._tables.page_index[item.row + last] * work.page_size
        return (last - entry) * work.page_size + jnp.minimum(item.context_len - position, work.page_size)

    def _item(self, index: Int32[Array, ""]) -> _Item:
        work, tables = self._work, self._tables
        w = self._core * work.items_per_core + index
        request = jax.lax.div(w, jnp.int32(work.items_per_request))
        # The items of a core may be filled up beyond the last request; those visit nothing.
        request = jnp.minimum(request, tables.context_lens.shape[0] - 1)
        return _Item(request * work.entries, tables.starts[w], tables.stops[w], tables.context_lens[request])

    def _move_to(self, index: Int32[Array, ""] | int) -> None:
        """The cursor to the first item from this one on that visits pages."""
        per_core = self._work.items_per_core
        found = self._tables.upcoming[self._core * (per_core + 1) + index]
        self._cursor[0] = found
        self._cursor[1] = self._tables.starts[self._core * per_core + found]

    def _start_next(self, slot: Int32[Array, ""]) -> None:
        index, entry = self._cursor[0], self._cursor[1]

        @pl.when(index < self._work.items_per_core)
        def _() -> None:
            item = self._item(index)
            self._each_copy(item, entry, slot, lambda copy: copy.start())
            following = entry + self._work.pages
            self._cursor[1] = following

            @pl.when(following >= item.stop)
            def _() -> None:
                self._move_to(index + 1)

    def _each_copy(
        self, item: _Item, entry: Int32[Array, ""], slot: Int32[Array, ""], act: Callable[[Any], None]
    ) -> None:
        work = self._work

        def act_on(i: Int32[Array, ""], _: None) -> None:
            page = self._tables.block_table[item.row + entry + i]
            tokens = pl.ds(pl.multiple_of(i * work.page_size, work.page_size), work.page_size)
            everything = slice(None)
            within = (everything, tokens) if work.tokens_in_lanes else (tokens,)
            places = (slot, everything, everything, *within), (slot, i)
            for pages, buffer, place in zip(self._pages, self._buffers, places, strict=False):
                act(pltpu.make_async_copy(pages.at[page], buffer.at[place], self._arrived.at[slot]))

        jax.lax.fori_loop(0, jnp.minimum(item.stop - entry, work.pages), act_on, None)
