"""What a sliced function is made of: stages, which are programs over flat tuples with their wiring.

Owns `Port`, `Stage`, `Slice` and `Attention`, how a stage is built, and the key by which like stages
are found equal. Knows nothing of cuts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from lamina_jax.slicing.trace import Atom, Const, Op, Program, evaluate, flatten, struct

StageFn = Callable[..., tuple[jax.Array, ...]]


@dataclass(frozen=True)
class Port:
    """Where a stage's input comes from, or where its output goes.

    Inputs of a stage of slice i:
        argument j: leaf j of the function's arguments.
        carried j: array j of `carried[i - 1]`.
        attention: the output of attention i - 1.
        stage1 j: output j of this slice's first stage.

    Outputs:
        q, k, v: of attention i; window, sinks: of attention i, where they are computed.
        carried j: array j of `carried[i]`.
        stage1 j: output j of this first stage, for the second stage only.
        result j: leaf j of what the function returns.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


@dataclass(frozen=True)
class Stage:
    """One program.

    Attributes:
        fn: `fn(*inputs) -> tuple(outputs)`, pure, for `jax.jit`. Stages of one key share one function.
        inputs, outputs: where each input comes from and each output goes.
        in_avals, out_avals: shape and dtype of each.
        operators: names of the primitives it runs, in order.
        key: hashable; equal for stages that differ in nothing but which argument leaves they read.
    """

    fn: StageFn
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    in_avals: tuple[jax.ShapeDtypeStruct, ...]
    out_avals: tuple[jax.ShapeDtypeStruct, ...]
    operators: tuple[str, ...]
    key: Hashable


@dataclass(frozen=True)
class Slice:
    """What runs between two attentions.

    Attributes:
        stages: of a slice that ends in an attention: the program that ends in q, then the one that
            ends in k, v and the carry. Of the last slice: its one program.
        fused: the same as one program; outputs q, k, v, the carry. Of the last slice: `stages[0]`.
    """

    stages: tuple[Stage, ...]
    fused: Stage


@dataclass(frozen=True)
class Attention:
    """One attention operator: between `slices[i]`, which computes q, k, v, and `slices[i + 1]`.

    Attributes:
        q, k, v, o: shapes and dtypes.
        scale, softcap: as given to the op.
        window: an int where it is a constant, `Port("argument", j)` where it is argument leaf j,
            otherwise `Port("window")`, an output of the slice's first stage.
        sinks: None, `Port("argument", j)`, or `Port("sinks")`, an output of its second stage.
    """

    q: jax.ShapeDtypeStruct
    k: jax.ShapeDtypeStruct
    v: jax.ShapeDtypeStruct
    o: jax.ShapeDtypeStruct
    scale: float
    softcap: float | None
    window: int | Port
    sinks: Port | None

    @property
    def has_sinks(self) -> bool:
        return self.sinks is not None


def build_stage(
    program: Program,
    sources: Mapping[int, Port],
    outputs: Sequence[tuple[Port, Atom]],
    functions: dict[Hashable, StageFn],
) -> Stage:
    """The stage that computes `outputs` from arguments and the values that `sources` names.

    `functions` holds the function of every key met so far. Inputs stand in the order of their first
    use, which does not depend on how the arguments are nested.
    """
    wanted = tuple(atom for _, atom in outputs)
    ops = [program.ops[i] for i in program.ancestors(wanted, sources)]
    read = [atom for op in ops for atom in op.reads] + list(wanted)
    used = [atom for atom in dict.fromkeys(read) if not isinstance(atom, Const) and atom in sources]
    inputs = tuple(sources[value] for value in used)
    in_avals = tuple(struct(program.avals[value]) for value in used)
    any_leaf = tuple(Port("argument") if port.kind == "argument" else port for port in inputs)
    ports = (any_leaf, tuple(port for port, _ in outputs))
    key = (ports, in_avals, _canonical(ops, used, wanted, program.avals))

    def run(*arrays: Any) -> tuple[jax.Array, ...]:
        return evaluate(ops, dict(zip(used, arrays, strict=True)), wanted)

    return Stage(
        fn=functions.setdefault(key, run),
        inputs=inputs,
        outputs=ports[1],
        in_avals=in_avals,
        out_avals=tuple(struct(a.aval if isinstance(a, Const) else program.avals[a]) for a in wanted),
        operators=tuple(op.name for op in ops),
        key=key,
    )


def _canonical(
    ops: Sequence[Op], inputs: Sequence[int], outputs: Sequence[Atom], avals: Sequence[Any]
) -> Hashable:
    """The operators with values numbered by first appearance: equal for equal programs."""
    numbers = {value: number for number, value in enumerate(inputs)}

    def canonical_atom(atom: Atom) -> Hashable:
        return _digest(atom) if isinstance(atom, Const) else numbers[atom]

    rows: list[Hashable] = []
    for op in ops:
        reads = tuple(map(canonical_atom, op.reads))
        for value in op.writes:
            numbers[value] = len(numbers)
        context = (op.eqn.ctx.compute_type, op.eqn.ctx.cur_abstract_mesh, op.eqn.ctx.xla_metadata)
        written = tuple(avals[value] for value in op.writes)
        rows.append((op.eqn.primitive, _frozen(op.eqn.params), _frozen(context), reads, written))
    return (*rows, tuple(map(canonical_atom, outputs)))


def _frozen(value: Any) -> Hashable:
    """A parameter of an operator in hashable form: equal by value where its type allows it.

    A type that compares by identity makes unlike what could be one program, never the other way round.
    """
    kind = type(value).__name__
    if isinstance(value, jex_core.Jaxpr | jex_core.ClosedJaxpr):
        avals, ops, outputs = flatten(value)
        num_args = len(getattr(value, "jaxpr", value).invars)
        return kind, tuple(avals[:num_args]), _canonical(ops, range(num_args), outputs, avals)
    if isinstance(value, np.ndarray | jax.Array):
        return kind, _digest(Const(value, jax.typeof(value)))
    if isinstance(value, Mapping):
        return kind, tuple((name, _frozen(value[name])) for name in sorted(value, key=str))
    if isinstance(value, tuple | list):
        return kind, tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return kind, _Identity(value)
    return kind, value


@dataclass(frozen=True, eq=False)
class _Identity:
    """Keeps an unhashable value alive and stands for it: equal to itself only."""

    value: Any


def _digest(const: Const) -> Hashable:
    value, dtype = const.value, const.aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return const.aval, hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
