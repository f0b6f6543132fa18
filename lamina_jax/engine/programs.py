"""The compute side's programs: slices with merge at their head, and the local part behind k and v.

The converter knows only the hole `o = attention(q, k, v)`. Here the hole gets its engine's reading:
`o` is merged from the parts of the layer before, and k, v leave with the local part computed.
A program takes its weights as arguments, so that like slices share one. XLA partitions the model's own
operators over the compute mesh, from the shardings of the weights; what is around them (cutting,
local part, merge) runs on every shard for its own heads, and moves nothing between shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.ops import Part, local_part, merge
from lamina_jax.pool.message import to_wire, unpack_part
from lamina_jax.pool.metadata import Leaf
from lamina_jax.slicing import Attention, Port, Sliced, Stage

Arrays = tuple[jax.Array, ...]

WHOLE = P()
"""Of the step's arguments, the carry and the logits: on every device of the compute mesh."""

HEADS = P(None, None, "tensor")
"""Of q, k, v and o [B, Q, heads, H], of lse [B, Q, N] and of the pieces that are sent."""

FLAT = P("tensor")
"""Of a message that came back (`lamina_jax.pool.message`), one of each shard."""

Form = Literal["query", "rest", "whole", "last"]
"""What a program is: a slice's stage 1, its stage 2, both in one, or the slice behind the last attention."""


@dataclass(frozen=True)
class Shape:
    """The static half of a program beside its stage.

    Attributes:
        rows, queries: B rows of Q tokens.
        mesh: the compute mesh, over whose axis "tensor" heads are cut.
        wire_dtype: of what is sent and of o as it comes back.
        pieces: in how many pieces each shard cuts its own heads for the workers.
        segments: in how many segments rows are cut (a cache partitioned by request).
        parts: how many cached parts come back for the same rows and heads (a cache partitioned by token).
    """

    rows: int
    queries: int
    mesh: Mesh
    wire_dtype: str
    pieces: int
    segments: int = 1
    parts: int = 1

    @property
    def sent_rows(self) -> int:
        """Rows of a message."""
        return self.rows // self.segments

    def of(self, x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """The shape [B, Q, heads, H] of an x[T, heads, H]."""
        return (self.rows, self.queries, *x.shape[1:])

    def batched(self, x: jax.Array) -> jax.Array:
        """[T, heads, H] as [B, Q, heads, H]."""
        return x.reshape(self.rows, self.queries, *x.shape[1:])

    def by_shard(self, function: Callable[..., Any], in_specs: tuple[P, ...]) -> Callable[..., Any]:
        """`function` on every shard's own heads; what it returns is cut along the heads."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=HEADS)


class Inputs(NamedTuple):
    """What a compute program reads.

    Attributes:
        arguments: the leaves of the model function's arguments that the stage reads, in its order:
            weights, and of the step tokens[T], positions[T], logits_at[B].
        carried: what crossed the boundary before this slice.
        local: the local part of the attention before; None in the first slice.
        cached: its cached part, a message of each part, segment and piece; empty where there is none.
        early: what this slice's first stage left for its second.
        q: this slice's q[B, Q, N, H], for its second stage.
        window: int32 scalar, the window of the attention after.
    """

    arguments: tuple[Leaf, ...]
    carried: tuple[Leaf, ...] = ()
    local: Leaf = None
    cached: tuple[Leaf, ...] = ()
    early: tuple[Leaf, ...] = ()
    q: Leaf = None
    window: Leaf = None


class QueryOutputs(NamedTuple):
    """Of a first stage: q cut for the workers, q itself, and what else the second stage needs."""

    sent: Arrays
    q: jax.Array
    early: Arrays


class SliceOutputs(NamedTuple):
    """Of a second stage or of a whole slice: what is sent, the local part, what is carried on."""

    sent: Arrays
    local: Part
    carried: Arrays


def query_stage(stage: Stage, shape: Shape, inputs: Inputs) -> QueryOutputs:
    """Stage 1 of a slice: everything that q needs."""
    q, *early = run_stage(stage, shape, inputs)
    q = shape.batched(q)
    sent = shape.by_shard(lambda q: _cut((q,), shape), (HEADS,))(q)
    return QueryOutputs(sent, q, tuple(early))


def rest_stage(stage: Stage, attention: Attention, shape: Shape, inputs: Inputs) -> SliceOutputs:
    """Stage 2: k, v, the local part and the carry, computed while the cached part is away."""
    k, v, *carried = run_stage(stage, shape, inputs)
    qkv = (inputs.q, shape.batched(k), shape.batched(v))
    sent, local = _attended(attention, shape, inputs.window, qkv, send_q=False)
    return SliceOutputs(sent, local, tuple(carried))


def whole_slice(
    stage: Stage, attention: Attention, shape: Shape, inputs: Inputs, *, send_q: bool
) -> SliceOutputs:
    """Both stages in one program; q leaves in one message with k and v, or not at all."""
    q, k, v, *carried = run_stage(stage, shape, inputs)
    qkv = (shape.batched(q), shape.batched(k), shape.batched(v))
    sent, local = _attended(attention, shape, inputs.window, qkv, send_q=send_q)
    return SliceOutputs(sent, local, tuple(carried))


def last_slice(stage: Stage, shape: Shape, inputs: Inputs) -> jax.Array:
    """The model's output: logits f32[B, V], whole on every device."""
    (logits,) = run_stage(stage, shape, inputs)
    return gathered_logits(logits, shape.mesh)


def gathered_logits(logits: jax.Array, mesh: Mesh) -> jax.Array:
    """Logits f32[B, V] whole on every device, each having computed its share of the vocabulary.

    Asked for whole logits alone, XLA gathers a tied embedding table instead and computes them everywhere.
    """
    if logits.shape[1] % mesh.shape["tensor"] == 0:
        logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, P(None, "tensor")))
    return jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, WHOLE))


def feed_tokens(last: jax.Array, feedback: jax.Array, tokens: jax.Array) -> jax.Array:
    """tokens[B] of a decode step: the host's, or those that the step before sampled (`last`)."""
    return jnp.where(feedback >= 0, last[jnp.maximum(feedback, 0)], tokens)


def windows_of(sliced: Sliced) -> list[int]:
    """The window of each attention.

    Raises:
        ValueError: a window that is computed, or attention sinks: no model family here has them yet.
    """
    windows = []
    for layer, attention in enumerate(sliced.attentions):
        if not isinstance(attention.window, int) or attention.has_sinks:
            raise ValueError(
                f"attention {layer} has a computed window or sinks, which the engine does not run"
            )
        windows.append(attention.window)
    return windows


def run_stage(stage: Stage, shape: Shape, inputs: Inputs) -> Arrays:
    """Evaluate a stage over what its ports name."""
    arguments = iter(inputs.arguments)

    def value(port: Port, aval: jax.ShapeDtypeStruct) -> jax.Array:
        match port.kind:
            case "argument":
                return next(arguments)
            case "carried":
                return inputs.carried[port.index]
            case "attention":
                return _merged(inputs, shape, aval)
            case "stage1":  # output 0 of a first stage is q
                return inputs.q.reshape(aval.shape) if port.index == 0 else inputs.early[port.index - 1]
        raise AssertionError(f"a stage reads {port}")

    return stage.fn(*map(value, stage.inputs, stage.in_avals))


def _merged(inputs: Inputs, shape: Shape, aval: jax.ShapeDtypeStruct) -> jax.Array:
    """The output of the attention before, as `aval` says."""

    def merged(local: Part, cached: Arrays) -> jax.Array:
        heads, size = local[0].shape[2] // shape.pieces, local[0].shape[3]
        piece = (shape.sent_rows, shape.queries, heads, size)
        pieces = [unpack_part(message, piece, jnp.dtype(shape.wire_dtype)) for message in cached]
        joined = _joined(_joined(pieces, shape.pieces, axis=2), shape.segments, axis=0)
        return merge([local, *joined])[0]

    o = shape.by_shard(merged, (HEADS, FLAT))(inputs.local, inputs.cached)
    return o.reshape(aval.shape).astype(aval.dtype)


def _attended(
    attention: Attention, shape: Shape, window: jax.Array, qkv: Arrays, *, send_q: bool
) -> tuple[Arrays, Part]:
    """k and v, with q or without it, cut for the workers; and the local part."""

    def attended(window: jax.Array, qkv: Arrays) -> tuple[Arrays, Part]:
        local = local_part(*qkv, scale=attention.scale, window=window, softcap=attention.softcap)
        return _cut(qkv if send_q else qkv[1:], shape), local

    return shape.by_shard(attended, (WHOLE, HEADS))(window, qkv)


def _cut(arrays: Arrays, shape: Shape) -> Arrays:
    """Each array [B, Q, heads, H] cut along rows and heads; its pieces joined with those of the others."""
    cut = [
        [piece for rows in jnp.split(x, shape.segments) for piece in jnp.split(rows, shape.pieces, axis=2)]
        for x in arrays
    ]
    pieces = [jnp.concatenate(piece, axis=2) for piece in zip(*cut, strict=True)]
    return tuple(to_wire(piece, shape.wire_dtype) for piece in pieces)


def _joined(
    parts: list[tuple[jax.Array, jax.Array]], count: int, axis: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Every `count` parts in a row put together along an axis."""
    groups = [parts[i : i + count] for i in range(0, len(parts), count)]
    return [
        (jnp.concatenate([o for o, _ in group], axis), jnp.concatenate([lse for _, lse in group], axis))
        for group in groups
    ]
