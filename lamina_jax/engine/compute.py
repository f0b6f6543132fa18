"""The compute side: weights on the compute mesh, and the compiled slices of every bucket.

It keeps no request state: what a slice computes is handed back to the decode loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from lamina_jax.compilation import Compilation, Footprint, Job, largest
from lamina_jax.core import MicrobatchPlan
from lamina_jax.engine import programs
from lamina_jax.engine.buckets import SMALLEST_BATCH, Bucket, padded_rows
from lamina_jax.engine.programs import Arrays, Form, Inputs, QueryOutputs, Shape, SliceOutputs
from lamina_jax.engine.sampler import PROMPT_ROWS, Chosen, Sampler, prompt_blocks
from lamina_jax.engine.sampling import Logprobs
from lamina_jax.engine.world import placed
from lamina_jax.native_products import with_native_products
from lamina_jax.pool.geometry import HeadTable
from lamina_jax.pool.message import message_shape
from lamina_jax.pool.partition import Partition
from lamina_jax.slicing import Sliced, Stage


@dataclass(frozen=True)
class Program:
    """A compiled stage, and what it reads of the model function's arguments: weights, or (as an int)
    one of the step's own."""

    compilation: Compilation
    arguments: tuple[Any, ...]

    def __call__(self, step: Arrays, **inputs: Any) -> Any:
        arguments = tuple([step[a] if type(a) is int else a for a in self.arguments])
        return self.compilation(Inputs(arguments, **inputs))


class ComputeSide:
    """The model's slices over its weights.

    `jobs` needs shapes and shardings alone: it also compiles for a mesh of devices that are only described.

    Args:
        sliced: the model function `fn(params, tokens[T], positions[T], logits_at[B]) -> logits[B, V]`.
        params: its weights, on the compute mesh, or their ShapeDtypeStructs with shardings.
        mesh: the compute mesh, of one axis "tensor".
        table: which heads its devices exchange with which worker.
        partition: how workers share the KV cache.
        wire_dtype: of what is exchanged.
        rows: most rows of a microbatch.
        sampler: chooses tokens, on the compute mesh.
        native: the mesh is of CPU devices that run native kernels, which know no mesh: if it is but one,
            products of few rows are theirs.
    """

    def __init__(
        self,
        sliced: Sliced,
        params: Any,
        mesh: Mesh,
        table: HeadTable,
        *,
        partition: Partition,
        wire_dtype: str,
        rows: int,
        sampler: Sampler,
        native: bool = False,
    ) -> None:
        self._native = native and mesh.size == 1
        self.num_slices, self._mesh, self._table = len(sliced.slices), mesh, table
        self._partition, self._wire_dtype = partition, wire_dtype
        self._rows = rows
        self._sliced_at = cache(lambda *shape: sliced.at(params, *step_shapes(*shape)))
        self.place = NamedSharding(mesh, programs.WHOLE)
        self._heads, self._flat = NamedSharding(mesh, programs.HEADS), NamedSharding(mesh, programs.FLAT)
        self._weights = jax.tree.leaves(params)
        self._window_sizes = programs.windows_of(sliced)
        self._sampler, self._queued = sampler, 0
        self._compilations: dict[Hashable, Compilation] = {}
        self._programs: dict[tuple[Bucket, bool, int, Form], Program] = {}
        self._prompts: dict[tuple[Bucket, bool], Program] = {}

    @property
    def programs_queued(self) -> int:
        """Since the beginning, the sampler's included."""
        return self._queued + self._sampler.programs_queued

    # What a step does -------------------------------------------------------------------------------

    def begin(self, plan: MicrobatchPlan, last: jax.Array) -> Arrays:
        """The step's own arguments on the mesh: tokens[T], positions[T], logits_at[max(B, 4)].

        `last` int32[rows]: what this microbatch's step before sampled.
        """
        host = (
            plan.tokens.reshape(-1),
            plan.positions.reshape(-1),
            padded_rows(plan.logits_at),
            plan.feedback,
        )
        tokens, positions, logits_at, feedback = placed(host, self.place)
        if plan.kind == "decode":
            self._queued += 1
            tokens = self._compilations["feed", plan.bucket](last, feedback, tokens)
        return tokens, positions, logits_at

    def run(self, plan: MicrobatchPlan, index: int, form: Form, step: Arrays, **inputs: Any) -> Any:
        """Queue slice `index` in one of its forms; see `lamina_jax.engine.programs` for what it returns."""
        if form in ("rest", "whole"):
            inputs["window"] = self._windows[index]
        self._queued += 1
        return self._programs[plan.bucket, plan.cached, index, form](step, **inputs)

    def sample(self, plan: MicrobatchPlan, logits: jax.Array, step: Arrays) -> Chosen:
        """Queue what chooses the next token of each row."""
        return self._sampler(plan, logits, step[0])

    def prompt_logprobs(self, plan: MicrobatchPlan, step: Arrays, **inputs: Any) -> list[Logprobs]:
        """Queue the last slice and the log-probabilities of the prompt, PROMPT_ROWS places at a time."""
        program, found = self._prompts[plan.bucket, plan.cached], []
        for places, targets in prompt_blocks(plan):
            self._queued += 1
            logits = program((*step[:2], placed(places, self.place)), **inputs)
            found.append(self._sampler.prompt_logprobs(logits, targets))
        return found

    @cached_property
    def _windows(self) -> list[jax.Array]:
        return [placed(np.int32(window), self.place) for window in self._window_sizes]

    def no_tokens(self) -> jax.Array:
        """`last` of a microbatch that has sampled nothing yet."""
        return placed(np.zeros(self._rows, np.int32), self.place)

    @property
    def footprint(self) -> Footprint:
        """The most that one of the programs compiled so far needs, on each device."""
        return largest([*self._compilations.values(), *self._sampler.programs])

    # Compilation ------------------------------------------------------------------------------------

    def compilation(self, bucket: Bucket, index: int, form: Form, *, cached: bool = True) -> Compilation:
        """The program of slice `index` in one of its forms, for which there were jobs."""
        return self._programs[bucket, cached, index, form].compilation

    def jobs(self, bucket: Bucket, *, cached: bool, overlap: bool) -> Iterator[Job]:
        """What compiles the programs of one bucket: with a cached part or none, in two stages or one."""
        sliced = self._sliced_at(bucket)
        shape = self._shape(bucket)
        for index in range(self.num_slices):
            for form in _forms(index == self.num_slices - 1, cached and overlap):
                stage, function, inputs = self._describe(sliced, shape, index, form, cached)
                arguments = self._arguments(stage)
                key = (
                    form,
                    cached and form == "whole",
                    stage.key,
                    shape,
                    _hashable(inputs),
                    tuple(type(a) is int for a in arguments),
                )
                name = f"slice {index} ({form}) {bucket}"
                yield from self._job(name, key, function, inputs, out=self._out(form))
                self._programs[bucket, cached, index, form] = Program(self._compilations[key], arguments)

        (logits,) = sliced.slices[-1].fused.out_avals
        yield from self._sampler.jobs(*logits.shape)
        if bucket[1] > 1:
            yield from self._prompt_jobs(bucket, cached)
        elif cached:
            feed = [self._struct((size,), np.int32) for size in (self._rows, bucket[0], bucket[0])]
            yield from self._job(f"feedback {bucket}", ("feed", bucket), programs.feed_tokens, *feed)

    def _prompt_jobs(self, bucket: Bucket, cached: bool) -> Iterator[Job]:
        """The last slice once more, for the logits of PROMPT_ROWS places of a prompt."""
        sliced = self._sliced_at(bucket, PROMPT_ROWS)
        shape = self._shape(bucket)
        stage, function, inputs = self._describe(sliced, shape, self.num_slices - 1, "last", cached)
        key = ("prompt", bucket, cached)
        yield from self._job(f"logits of prompts {bucket}", key, function, inputs, out=self.place)
        self._prompts[bucket, cached] = Program(self._compilations[key], self._arguments(stage))
        (logits,) = stage.out_avals
        yield from self._sampler.prompt_jobs(logits.shape[1])

    def _job(
        self, name: str, key: Hashable, function: Callable[..., Any], *inputs: Any, out: Any = None
    ) -> Iterator[Job]:
        if key not in self._compilations:
            program = with_native_products(function) if self._native else function
            self._compilations[key] = Compilation(program, inputs, out=out)
            yield name, self._compilations[key].compile

    def _describe(
        self, sliced: Sliced, shape: Shape, index: int, form: Form, cached: bool
    ) -> tuple[Stage, Callable[..., Any], Inputs]:
        """(the stage, the function around it, the shapes that this takes) of one program."""
        piece = sliced.slices[index]
        stage = {"query": piece.stages[0], "rest": piece.stages[-1]}.get(form, piece.fused)
        fields: dict[str, Any] = {}
        if index:
            fields |= self._parts(sliced, shape, index - 1, cached)
            fields["carried"] = tuple(self._struct(a.shape, a.dtype) for a in sliced.carried[index - 1])
        if form == "last":
            function: Callable[..., Any] = partial(programs.last_slice, stage, shape)
        elif form == "query":
            function = partial(programs.query_stage, stage, shape)
        else:
            attention = sliced.attentions[index]
            fields["window"] = self._struct((), np.int32)
            if form == "whole":
                function = partial(programs.whole_slice, stage, attention, shape, send_q=cached)
            else:
                function = partial(programs.rest_stage, stage, attention, shape)
                fields["q"] = self._struct(shape.of(attention.q), attention.q.dtype, self._heads)
                fields["early"] = tuple(self._struct(a.shape, a.dtype) for a in piece.stages[0].out_avals[1:])
        arguments = tuple(
            self._struct(aval.shape, aval.dtype, self._sharding(port.index))
            for port, aval in zip(stage.inputs, stage.in_avals, strict=True)
            if port.kind == "argument"
        )
        return stage, function, Inputs(arguments, **fields)

    def _parts(self, sliced: Sliced, shape: Shape, layer: int, cached: bool) -> dict[str, Any]:
        """The shapes of the parts of attention `layer`."""
        op = sliced.attentions[layer].o
        _, queries, heads, size = local = shape.of(op)
        dtype = jnp.dtype(self._wire_dtype)
        piece = message_shape((shape.sent_rows, queries, heads // len(self._table.pieces), size), dtype)
        message = self._struct((self._table.shards * piece.size,), piece.dtype, self._flat)
        return {
            "local": tuple(self._struct(dims, np.float32, self._heads) for dims in (local, local[:3])),
            "cached": (message,) * (shape.parts * shape.segments * shape.pieces) if cached else (),
        }

    def _shape(self, bucket: Bucket) -> Shape:
        partition = self._partition
        return Shape(
            *bucket,
            self._mesh,
            self._wire_dtype,
            pieces=self._table.per_shard,
            # The rows of a prefill microbatch are all of one worker.
            segments=partition.workers if partition.kind == "requests" and bucket[1] == 1 else 1,
            parts=partition.workers if partition.kind == "tokens" else 1,
        )

    def _out(self, form: Form) -> Any:
        """Where a program leaves what it returns: sent, q or the local part, early or the carry; logits."""
        if form == "last":
            return self.place
        outputs: Any = QueryOutputs if form == "query" else SliceOutputs
        return outputs(self._heads, self._heads, self.place)

    def _arguments(self, stage: Stage) -> tuple[Any, ...]:
        """The weights that a stage reads and, as ints, the step's own arguments, in its order."""
        indices = [port.index for port in stage.inputs if port.kind == "argument"]
        count = len(self._weights)
        return tuple(self._weights[i] if i < count else i - count for i in indices)

    def _sharding(self, argument: int) -> Sharding:
        return self._weights[argument].sharding if argument < len(self._weights) else self.place

    def _struct(
        self, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None = None
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.place)


def step_shapes(bucket: Bucket, logits: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of tokens, positions and logits_at in a step of B rows of Q tokens.

    `logits`: how many logits are asked for; None: max(B, 4).
    """
    rows, queries = bucket
    sizes = (rows * queries, rows * queries, logits or max(rows, SMALLEST_BATCH))
    return tuple(jax.ShapeDtypeStruct((size,), np.int32) for size in sizes)


def _forms(is_last: bool, overlap: bool) -> tuple[Form, ...]:
    if is_last:
        return ("last",)
    return ("query", "rest") if overlap else ("whole",)


def _hashable(tree: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(leaves)
