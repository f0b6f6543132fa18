"""One memory device's share of the pool: its KV pages of every layer, and the programs over them.

It appends k and v to pages and computes the cached part of attention. It has no weights, and it knows
nothing of requests: a step tells it pages, slots and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lamina_jax.compilation import Compilation, Footprint, Job, largest
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.message import from_wire, message_dtype, pack_part
from lamina_jax.pool.metadata import StepMetadata, metadata_shapes
from lamina_jax.pool.pages import keep_kv, make_pages, pages_struct, stored_struct
from pallas_kernels import Pages, SplitPlan, keep_stored, paged_attention, refusal, split_plan

Arrays = tuple[jax.Array, ...]
Messages = tuple[jax.Array | np.ndarray, ...]
"""What a shard is sent: on its device, or on the host where that is the same memory."""

Bucket = tuple[int, int]


class AttentionKind(NamedTuple):
    """The static half of an attention operator. Its window is an argument."""

    scale: float
    softcap: float | None


CachedPart = Callable[..., tuple[jax.Array, jax.Array]]
"""What computes the cached part, with the signature and the contract of `pallas_kernels.paged_attention`."""

ProgramKey = tuple[str, Bucket, AttentionKind | None]
"""A program of a shard: its name, its bucket, and which attention it computes, if any."""


class Begun(NamedTuple):
    """A microbatch's step on a device: what it was told, and what its layers plan alike, by their window."""

    meta: StepMetadata
    plans: dict[int, SplitPlan]

    @property
    def bucket(self) -> Bucket:
        rows, queries = self.meta.positions.shape
        return rows, queries


class Kernels(NamedTuple):
    """What the programs of a shard compute, apart from it: a program that is kept keeps no pages.

    Attributes:
        platform: whose kernels run; see `kernel_platform`.
        cached_part, pieces, copies: as `AttentionShard` is given them.
    """

    geometry: CacheGeometry
    platform: str | None
    cached_part: CachedPart
    pieces: int
    copies: int

    def append(self, pages: Pages, slots: jax.Array, kv: Arrays) -> Pages:
        """The pages with k and v of messages."""
        g = self.geometry
        halves = [jnp.split(from_wire(piece, g.wire_dtype), 2, axis=2) for piece in kv]
        k, v = (jnp.concatenate(pieces, axis=2) for pieces in zip(*halves, strict=True))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return keep_kv(pages, k, v, slots.reshape(-1), dtype=g.dtype, platform=self.platform)

    def plans(
        self, meta: StepMetadata, *, q: jax.ShapeDtypeStruct, pages: Any, windows: tuple[int, ...]
    ) -> dict[int, SplitPlan]:
        """By window, what layers plan for such q and pages; nothing where the kernel plans nothing."""
        lengths = meta.context_lens, meta.page_index, meta.positions
        plans = {window: split_plan(q, pages, *lengths, window, platform=self.platform) for window in windows}
        return {window: plan for window, plan in plans.items() if plan is not None}

    def attend(
        self,
        kind: AttentionKind,
        pages: Pages,
        window: jax.Array,
        plan: SplitPlan | None,
        meta: StepMetadata,
        q: Arrays,
    ) -> Arrays:
        """The cached part of messages q, as messages."""
        wire = self.geometry.wire_dtype
        o, lse = self.cached_part(
            jnp.concatenate([from_wire(piece, wire) for piece in q], axis=2),
            pages,
            meta.block_tables,
            meta.context_lens,
            meta.page_index,
            meta.positions,
            window,
            scale=kind.scale,
            softcap=kind.softcap,
            dtype=self.geometry.dtype,
            platform=self.platform,
            plan=plan,
        )
        parts = zip(*(jnp.split(x, self.pieces, axis=2) for x in (o.astype(wire), lse)), strict=True)
        return tuple(pack_part(*part) for part in parts)

    def append_and_attend(
        self,
        kind: AttentionKind,
        pages: Pages,
        window: jax.Array,
        plan: SplitPlan | None,
        meta: StepMetadata,
        qkv: Arrays,
    ) -> tuple[Pages, Arrays]:
        """Both, for messages of q, k and v."""
        # Append first: reading a donated pool and then writing it in one program copies it. The new tokens
        # lie beyond context_lens, so the cached part does not see them.
        heads = self.geometry.num_heads // self.pieces
        pages = self.append(pages, meta.slots, tuple(piece[:, :, heads:] for piece in qkv[:: self.copies]))
        q = tuple(piece[:, :, :heads] for piece in qkv)
        return pages, self.attend(kind, pages, window, plan, meta, q)


class AttentionShard:
    """KV pages of `geometry` (this device's share of the heads) on `device`, from `hold` on.

    `jobs` also compiles for a device that is only described.

    Args:
        geometry: the shape of this share.
        device: where the pages live and the programs run.
        windows: the attention window of each layer (`lamina_jax.ops.NO_WINDOW`: none).
        kinds: scale and softcap of each layer's attention.
        cached_part: what computes the cached part; None: `paged_attention`.
        pieces: in how many equal pieces the heads come and go, each by its own message (n = N / pieces).
        copies: of so many pieces in a row that have the same KV heads, the first one's k and v are kept.
        native: run the native kernel of a CPU, where it takes these pages.

    Attributes:
        pages: of each layer, as stored (`lamina_jax.pool.pages`); for tests and for filling a cache.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        device: jax.Device,
        windows: Sequence[int],
        kinds: Sequence[AttentionKind],
        *,
        cached_part: CachedPart | None = None,
        pieces: int = 1,
        copies: int = 1,
        native: bool = False,
    ) -> None:
        self.geometry, self.device = geometry, device
        self._pieces, self._copies = pieces, copies
        self._kinds, self._window_sizes = kinds, windows
        self._place = SingleDeviceSharding(device)
        self._layer = pages_struct(geometry, self._place)
        platform = kernel_platform(geometry, device.platform, native=native)
        self._kernels = Kernels(geometry, platform, cached_part or paged_attention, pieces, copies)
        self.pages: list[Pages] = []
        self._programs: dict[ProgramKey, Compilation] = {}

    # What a step does -------------------------------------------------------------------------------

    def begin(self, told: StepMetadata) -> Begun:
        """Bring a microbatch's metadata to the device, and plan its attention there."""
        meta = jax.device_put(told, self.device)
        make_plans = self._programs.get(("plan", told.positions.shape, None))
        return Begun(meta, make_plans(meta) if make_plans else {})

    def attend(self, layer: int, begun: Begun, q: Messages) -> Arrays:
        """The cached part of each piece q[B, Q, n, H] as a message (`lamina_jax.pool.message`), o in q's
        dtype."""
        program = self._programs["attend", begun.bucket, self._kinds[layer]]
        return program(self.pages[layer], *self._shared(layer, begun), q)

    def append(self, layer: int, begun: Begun, kv: Messages) -> None:
        """Keep kv[B, Q, 2k, H] (k's heads, then v's) of each piece that is no copy of the one before in
        the pages that the step names."""
        program = self._programs["append", begun.bucket, None]
        self.pages[layer] = program(self.pages[layer], begun.meta.slots, kv)

    def append_and_attend(self, layer: int, begun: Begun, qkv: Messages) -> Arrays:
        """Both for messages qkv[B, Q, n + 2k, H] of all pieces; the cached part does not see the new
        tokens."""
        program = self._programs["both", begun.bucket, self._kinds[layer]]
        self.pages[layer], messages = program(self.pages[layer], *self._shared(layer, begun), qkv)
        return messages

    def _shared(self, layer: int, begun: Begun) -> tuple[jax.Array, SplitPlan | None, StepMetadata]:
        """Beside pages and messages, what the cached part of a layer is computed from."""
        return self._windows[layer], begun.plans.get(self._window_sizes[layer]), begun.meta

    def keep_stored(self, layer: int, slots: jax.Array | np.ndarray, stored: Messages) -> None:
        """Keep what other pages hold of a layer, arrays [T, 2, K, ...], in slots[T]; see `stored_job`."""
        pages, program = self.pages[layer], self._programs["pulled", (len(slots), 1), None]
        self.pages[layer] = program(pages, jax.tree.unflatten(jax.tree.structure(pages), stored), slots)

    @cached_property
    def _windows(self) -> list[jax.Array]:
        return [jax.device_put(np.int32(window), self.device) for window in self._window_sizes]

    # Compilation ------------------------------------------------------------------------------------

    def jobs(self, bucket: Bucket, pages_per_request: int, *, cached: bool, overlap: bool) -> Iterator[Job]:
        """What compiles the programs of one bucket: with a cached part or none, in two messages or one."""
        meta = metadata_shapes(bucket, pages_per_request, self._place)
        wanted: dict[ProgramKey, Compilation] = {}
        if overlap or not cached:
            wanted["append", bucket, None] = self._append_program(bucket, meta)
        if cached:
            name = "attend" if overlap else "both"
            planning = self._plan_program(bucket, meta)
            if plans := planning.shapes(self._place):
                wanted["plan", bucket, None] = planning
            plan = next(iter(plans.values()), None)  # of all windows alike
            for kind in dict.fromkeys(self._kinds):  # most layers have the same
                wanted[name, bucket, kind] = self._attend_program(name, bucket, kind, meta, plan)
        for key, program in wanted.items():
            if key not in self._programs:
                self._programs[key] = program
                yield f"{key[0]} {bucket} on {self.device}", program.compile

    def stored_job(self, tokens: int) -> Job:
        """What compiles the program that keeps T = `tokens` tokens of other pages."""
        slots = jax.ShapeDtypeStruct((tokens,), np.int32, sharding=self._place)
        inputs = (self._layer, stored_struct(self._layer, tokens), slots)
        keep = partial(keep_stored, platform=self._kernels.platform)
        program = self._programs["pulled", (tokens, 1), None] = Compilation(keep, inputs, donate=(0,))
        return f"pulled {tokens} on {self.device}", program.compile

    def _plan_program(self, bucket: Bucket, meta: StepMetadata) -> Compilation:
        g = self.geometry
        q = jax.ShapeDtypeStruct((*bucket, g.num_heads, g.head_dim), jnp.dtype(g.wire_dtype))
        windows = tuple(dict.fromkeys(self._window_sizes))
        return Compilation(partial(self._kernels.plans, q=q, pages=self._layer, windows=windows), (meta,))

    def _append_program(self, bucket: Bucket, meta: StepMetadata) -> Compilation:
        count = self._pieces // self._copies
        kv = self._messages(count, bucket, 2 * self.geometry.num_kv_heads // count)
        return Compilation(self._kernels.append, (self._layer, meta.slots, kv), donate=(0,))

    def _attend_program(
        self, name: str, bucket: Bucket, kind: AttentionKind, meta: StepMetadata, plan: SplitPlan | None
    ) -> Compilation:
        g, both = self.geometry, name == "both"
        kv_heads = 2 * g.num_kv_heads * self._copies // self._pieces if both else 0
        messages = self._messages(self._pieces, bucket, g.num_heads // self._pieces + kv_heads)
        window = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._place)
        inputs = (self._layer, window, plan, meta, messages)
        if both:
            return Compilation(partial(self._kernels.append_and_attend, kind), inputs, donate=(0,))
        return Compilation(partial(self._kernels.attend, kind), inputs)

    def _messages(self, count: int, bucket: Bucket, heads: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape, dtype = (*bucket, heads, self.geometry.head_dim), message_dtype(self.geometry.wire_dtype)
        return (jax.ShapeDtypeStruct(shape, dtype, sharding=self._place),) * count

    @property
    def footprint(self) -> Footprint:
        """The most that one of the programs compiled so far needs; its messages count as results."""
        needs = largest(self._programs.values())
        sent = [program.num_bytes(-1) for (name, *_), program in self._programs.items() if name != "plan"]
        return needs._replace(results=needs.results + max(sent, default=0))

    # What it holds ----------------------------------------------------------------------------------

    def hold(self) -> None:
        """Make the pages, all zeros."""
        self.pages = make_pages(self.geometry, self._place)


def kernel_platform(g: CacheGeometry, platform: str, *, native: bool = False) -> str | None:
    """Whose kernels a device runs over pages of this shape; None: XLA's plain operators.

    `native`: it is a CPU that may run the native ones, where they take these pages.
    """
    readings = ("native", platform) if native else (platform,)
    return next((each for each in readings if not refusal(each, g.dtype, g.page_size, g.head_dim)), None)
