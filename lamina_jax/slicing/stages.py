"""What a sliced function is made of: stages, which are programs over flat tuples with their wiring.

Owns `Port`, `Stage`, `Slice` and `Attention`, how a stage is built, and the key by which like stages
are found equal. Knows nothing of cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lamina_jax.slicing.operators import Atom, Const, canonical
from lamina_jax.slicing.trace import Program, evaluate

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
    in_avals = tuple(program.struct(value) for value in used)
    any_leaf = tuple(Port("argument") if port.kind == "argument" else port for port in inputs)
    ports = (any_leaf, tuple(port for port, _ in outputs))
    key = (ports, in_avals, canonical(ops, used, wanted))

    def run(*arrays: Any) -> tuple[jax.Array, ...]:
        return evaluate(ops, dict(zip(used, arrays, strict=True)), wanted)

    return Stage(
        fn=functions.setdefault(key, run),
        inputs=inputs,
        outputs=ports[1],
        in_avals=in_avals,
        out_avals=tuple(map(program.struct, wanted)),
        operators=tuple(op.name for op in ops),
        key=key,
    )
