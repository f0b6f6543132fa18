"""The collocated model: one program per step and the sampler, attention and KV cache on the compute devices.

Each attention is replaced in line by append, cached part over the old length, local part and merge.
It is the baseline of every comparison, and a server in its own right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.compilation import Compilation, Footprint, Job, largest
from lamina_jax.core import MicrobatchPlan, Sampled, StepPlan
from lamina_jax.engine.buckets import SMALLEST_BATCH, Bucket, padded_rows
from lamina_jax.engine.compute import step_shapes
from lamina_jax.engine.programs import Arrays, feed_tokens, gathered_logits
from lamina_jax.engine.sampler import PROMPT_ROWS, Chosen, Sampler, prompt_blocks, sampled
from lamina_jax.engine.sampling import Logprobs
from lamina_jax.native_products import with_native_products
from lamina_jax.ops import Part, local_part, merge
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.metadata import StepMetadata, metadata_of, metadata_shapes
from lamina_jax.pool.pages import keep_kv, make_pages, pages_struct
from lamina_jax.pool.shard import kernel_platform
from lamina_jax.slicing import Attention, Port, Sliced, Stage
from pallas_kernels import Pages, paged_attention

_Result = tuple[MicrobatchPlan, Chosen | None, list[Logprobs]]


class CollocatedRunner:
    """Runs step plans as one program each; see `ModelRunner`.

    Args:
        sliced: the model function, cut; it says where the attentions are.
        params: the weights, on `mesh`.
        geometry: of the KV cache, which is sharded by KV head over the axis "tensor" of `mesh`, and which
            `hold` makes.
        rows: most rows of a microbatch.
        pages_per_request: M, the width of a block table.
        sampler: chooses tokens, on `mesh`.
        native: the mesh is of CPU devices that run the native kernels, products only where it is but one.
    """

    def __init__(
        self,
        sliced: Sliced,
        params: Any,
        geometry: CacheGeometry,
        mesh: Mesh,
        *,
        rows: int,
        pages_per_request: int,
        sampler: Sampler,
        native: bool = False,
    ) -> None:
        self._geometry, self._mesh, self._native = geometry, mesh, native
        self._sliced_at = cache(lambda *shape: sliced.at(params, *step_shapes(*shape)))
        self._rows, self._pages_per_request, self._sampler = rows, pages_per_request, sampler
        self._replicated = NamedSharding(mesh, P())
        self._by_head = NamedSharding(mesh, P(None, None, "tensor"))
        self._weights = tuple(jax.tree.leaves(params))
        self.pages: list[Pages] = []
        self._programs: dict[tuple[Bucket, bool], Compilation] = {}
        self._prompts: dict[Bucket, Compilation] = {}
        self._last: dict[int, jax.Array] = {}
        self._steps, self._queued, self._seconds = 0, 0, 0.0

    def dispatch(self, plan: StepPlan) -> list[_Result]:
        started = time.perf_counter()
        results = [self._run(batch) for batch in plan.microbatches]
        self._steps += 1
        self._seconds += time.perf_counter() - started
        return results

    def read(self, step: list[_Result]) -> list[Sampled]:
        return [sampled(*result) for result in step]

    def stats(self) -> dict[str, Any]:
        steps = max(self._steps, 1)
        return {
            "programs_per_step": (self._queued + self._sampler.programs_queued) / steps,
            "dispatch_microseconds_per_step": 1e6 * self._seconds / steps,
            "wire_bytes_per_step": 0.0,
            "wire_messages_per_step": 0.0,
            "wire_metadata_bytes_per_step": 0.0,
        }

    def fill_pages(self, fill: Callable[[jax.Array], jax.Array]) -> None:
        """Replace every array of pages by `fill` of it; for benchmarks that do not prefill."""
        for layer, pages in enumerate(self.pages):  # one by one: two pools may not fit
            self.pages[layer] = jax.tree.map(fill, pages)

    @property
    def footprint(self) -> Footprint:
        """The most that one of the programs compiled so far needs, on each device."""
        return largest([*self._programs.values(), *self._prompts.values(), *self._sampler.programs])

    def jobs(self, bucket: Bucket, *, cached: bool) -> Iterator[Job]:
        """What compiles the program of one bucket: with a cached part or none."""
        rows, queries = bucket

        def struct(size: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size,), np.int32, sharding=self._replicated)

        def like(array: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

        sliced = self._sliced_at(bucket)
        attend = self._attend if cached else None
        step: Callable[..., Any] = partial(_step, sliced, bucket, attend, self._keep, self._mesh)
        weights = tuple(like(weight) for weight in self._weights)
        inputs = (
            [pages_struct(self._geometry, self._by_head)] * self._geometry.num_layers,
            weights,
            struct(self._rows),
            struct(rows),
            struct(rows * queries),
            struct(max(rows, SMALLEST_BATCH)),
            metadata_shapes(bucket, self._pages_per_request, self._replicated),
        )
        if (bucket, cached) not in self._programs:
            if self._native and self._mesh.size == 1:
                step = with_native_products(step)
            program = self._programs[bucket, cached] = Compilation(step, inputs, donate=(0,))
            yield f"step {bucket}", program.compile
        (logits,) = sliced.slices[-1].fused.out_avals
        yield from self._sampler.jobs(*logits.shape)
        if queries > 1 and bucket not in self._prompts:
            last = self._sliced_at(bucket, PROMPT_ROWS).slices[-1].fused
            behind = tuple(
                jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=self._replicated)
                for port, aval in zip(last.inputs, last.in_avals, strict=True)
                if port.kind != "argument"
            )
            shapes = (struct(rows * queries), struct(rows * queries), struct(PROMPT_ROWS))
            function = partial(_logits, last, self._mesh)
            self._prompts[bucket] = Compilation(function, ((*weights, *shapes), behind))
            yield f"logits of prompts {bucket}", self._prompts[bucket].compile
            yield from self._sampler.prompt_jobs(logits.shape[1])

    @cached_property
    def _no_tokens(self) -> jax.Array:
        return jax.device_put(np.zeros(self._rows, np.int32), self._replicated)

    def _run(self, plan: MicrobatchPlan) -> _Result:
        host = (plan.feedback, plan.tokens.reshape(-1), padded_rows(plan.logits_at), metadata_of(plan))
        last = self._last.get(plan.microbatch, self._no_tokens)
        feedback, tokens, logits_at, meta = jax.device_put(host, self._replicated)
        self._queued += 1
        self.pages, logits, tokens, behind = self._programs[plan.bucket, plan.cached](
            self.pages, self._weights, last, feedback, tokens, logits_at, meta
        )
        chosen = self._sampler(plan, logits, tokens) if plan.samples.any() else None
        if plan.kind == "decode" and chosen:
            self._last[plan.microbatch] = chosen.tokens
        return plan, chosen, self._prompt_logprobs(plan, tokens, behind)

    def _prompt_logprobs(self, plan: MicrobatchPlan, tokens: jax.Array, behind: Arrays) -> list[Logprobs]:
        if plan.prompt_targets is None:
            return []
        positions, found = jax.device_put(plan.positions.reshape(-1), self._replicated), []
        for places, targets in prompt_blocks(plan):
            self._queued += 1
            step = (tokens, positions, jax.device_put(places, self._replicated))
            logits = self._prompts[plan.bucket]((*self._weights, *step), behind)
            found.append(self._sampler.prompt_logprobs(logits, targets))
        return found

    def hold(self, num_pages: int) -> None:
        """Make the pages, all zeros. Where they are others than `geometry` said, the programs that were
        compiled for those are let go."""
        if num_pages != self._geometry.num_pages:
            self._geometry = replace(self._geometry, num_pages=num_pages)
            self._programs.clear()
        self.pages = make_pages(self._geometry, self._by_head)

    @property
    def _platform(self) -> str | None:
        return kernel_platform(self._geometry, self._mesh.devices.flat[0].platform, native=self._native)

    def _keep(self, pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
        """The pages with k and v[T, K, H], each device for its own KV heads."""
        keep = partial(keep_kv, dtype=self._geometry.dtype, platform=self._platform)
        by_head = P(None, None, "tensor")
        specs = (by_head, P(None, "tensor"), P(None, "tensor"), P())
        return jax.shard_map(keep, mesh=self._mesh, in_specs=specs, out_specs=by_head)(pages, k, v, slots)

    def _attend(self, attention: Attention, q: jax.Array, pages: Pages, meta: StepMetadata) -> Part:
        """The cached part of q[B, Q, N, H], each device for its own KV heads."""
        kernel = partial(
            paged_attention,
            window=jnp.int32(attention.window),
            scale=attention.scale,
            softcap=attention.softcap,
            dtype=self._geometry.dtype,
            platform=self._platform,
        )
        by_head, whole = P(None, None, "tensor"), P()
        return jax.shard_map(
            lambda q, pages, meta: kernel(
                q, pages, meta.block_tables, meta.context_lens, meta.page_index, meta.positions
            ),
            mesh=self._mesh,
            in_specs=(by_head, by_head, whole),
            out_specs=(by_head, by_head),
        )(q, pages, meta)


def _step(
    sliced: Sliced,
    bucket: Bucket,
    attend: Callable[..., Part] | None,
    keep: Callable[..., Pages],
    mesh: Mesh,
    pages: list[Pages],
    weights: Arrays,
    last: jax.Array,
    feedback: jax.Array,
    tokens: jax.Array,
    logits_at: jax.Array,
    meta: StepMetadata,
) -> tuple[list[Pages], jax.Array, jax.Array, Arrays]:
    """The pages after the step, the logits, tokens[T], and what the last slice reads beside its arguments."""
    if attend is not None and bucket[1] == 1:
        tokens = feed_tokens(last, feedback, tokens)
    arguments = (*weights, tokens, meta.positions.reshape(-1), logits_at)
    values: dict[Port, jax.Array] = {Port("argument", i): array for i, array in enumerate(arguments)}
    pages = list(pages)
    for layer, attention in enumerate(sliced.attentions):
        stage = sliced.slices[layer].fused
        out = dict(zip(stage.outputs, stage.fn(*map(values.__getitem__, stage.inputs)), strict=True))
        q, k, v = (x.reshape(*bucket, *x.shape[1:]) for x in (out[Port("q")], out[Port("k")], out[Port("v")]))
        pages[layer] = keep(pages[layer], out[Port("k")], out[Port("v")], meta.slots.reshape(-1))
        window = jnp.int32(attention.window)
        parts = [local_part(q, k, v, scale=attention.scale, window=window, softcap=attention.softcap)]
        if attend is not None:
            parts.append(attend(attention, q, pages[layer], meta))
        o = merge(parts)[0].reshape(attention.o.shape).astype(attention.o.dtype)
        values |= {port: value for port, value in out.items() if port.kind == "carried"}
        values[Port("attention")] = o
    last_stage = sliced.slices[-1].fused
    behind = tuple(values[port] for port in last_stage.inputs if port.kind != "argument")
    whole = NamedSharding(mesh, P())
    behind = tuple(jax.lax.with_sharding_constraint(x, whole) for x in behind) if bucket[1] > 1 else ()
    (logits,) = last_stage.fn(*map(values.__getitem__, last_stage.inputs))
    return pages, gathered_logits(logits, mesh), tokens, behind


def _logits(last: Stage, mesh: Mesh, arguments: Arrays, behind: Arrays) -> jax.Array:
    """The last slice on its own, at other places of the step's tokens."""
    rest = iter(behind)
    inputs = [arguments[port.index] if port.kind == "argument" else next(rest) for port in last.inputs]
    (logits,) = last.fn(*inputs)
    return gathered_logits(logits, mesh)
