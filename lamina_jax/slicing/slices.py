"""A function with n attention operators as n + 1 slices, and the way back.

Owns `slice_at_attention` and what it returns. Knows nothing of meshes, caches or requests: it knows
the hole `o = attention(q, k, v)` and what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import numpy as np

from lamina_jax.ops import attention
from lamina_jax.slicing.cut import Cut, cut_program
from lamina_jax.slicing.draw import mermaid
from lamina_jax.slicing.explain import table
from lamina_jax.slicing.operators import Atom, Const
from lamina_jax.slicing.stages import Attention, Port, Slice, StageFn, build_stage
from lamina_jax.slicing.trace import Program, trace


@dataclass(frozen=True, eq=False)
class Sliced:
    """A function cut at its attentions; see `slice_at_attention`.

    Attributes:
        slices: n + 1 slices.
        attentions: the n attention operators between them.
        carried: of each of the n boundaries: shape and dtype of every array that crosses it beside
            the attention's own q, k, v and output.
        cut: the same in terms of the traced program, with the number of flow problems solved.
    """

    slices: tuple[Slice, ...]
    attentions: tuple[Attention, ...]
    carried: tuple[tuple[jax.ShapeDtypeStruct, ...], ...]
    cut: Cut
    _fn: Callable[..., Any]
    _program: Program

    def __call__(self, *args: Any) -> Any:
        """The slices one after the other with the op's plain meaning: what `fn(*args)` returns.

        Raises:
            ValueError: arguments of other structure, shapes or dtypes than the function was cut for.
        """
        inputs = {Port("argument", j): leaf for j, leaf in enumerate(self._leaves(args))}
        for i, piece in enumerate(self.slices):
            outputs: dict[Port, jax.Array] = {}
            for stage in piece.stages:
                values = stage.fn(*(inputs[port] for port in stage.inputs))
                outputs.update(zip(stage.outputs, values, strict=True))
                inputs.update((Port("stage1", j), value) for j, value in enumerate(values))
            if i < len(self.attentions):
                inputs |= {port: value for port, value in outputs.items() if port.kind == "carried"}
                inputs[Port("attention")] = _plain(self.attentions[i], inputs | outputs)
        results = [outputs[Port("result", j)] for j in range(len(self._program.outputs))]
        return jax.tree.unflatten(self._program.out_tree, results)

    def at(self, *abstract_args: Any) -> Sliced:
        """The same cut at other shapes, without solving it again.

        Raises:
            ValueError: at these shapes the function calls other operators.
        """
        program = trace(self._fn, abstract_args)
        _check_same_operators(self._program, program)
        return _assemble(self._fn, program, self.cut)

    def explain(self) -> str:
        """A table to print: what each slice and stage runs, takes, carries and sends."""
        return table(self.slices, self.attentions, self.carried)

    def draw(self) -> str:
        """The same as a flowchart in Mermaid, every array at its arrow; see `lamina_jax.slicing.draw`."""
        return mermaid(self.slices, self.attentions)

    def _leaves(self, args: tuple[Any, ...]) -> list[Any]:
        leaves, tree = jax.tree.flatten(args)
        if tree != self._program.in_tree:
            raise ValueError(f"the function was sliced for arguments {self._program.in_tree}, got {tree}")
        for j, (leaf, aval) in enumerate(zip(leaves, self._program.avals, strict=False)):
            given = jax.typeof(leaf)
            if (given.shape, given.dtype) != (aval.shape, aval.dtype):
                raise ValueError(
                    f"argument leaf {j} is {given.str_short()}, but the function was sliced for "
                    f"{aval.str_short()}; use sliced.at(...) for other shapes"
                )
        return leaves


def slice_at_attention(fn: Callable[..., Any], *abstract_args: Any) -> Sliced:
    """Cut `fn` at its n calls of `lamina_jax.attention` into n + 1 slices (paper 4.2).

    Each boundary carries the fewest bytes at these shapes; cheap operators may be computed on both
    sides of it, costly ones run once. Arguments, and so weights, are inputs of every slice that
    reads them; arrays that `fn` closes over are constants of the slices.

    Args:
        fn: a pure function of pytrees that calls `lamina_jax.attention` in plain Python.
        abstract_args: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: an attention inside `lax.scan`, `while_loop`, `cond` or another operator with a
            body of its own (write a Python loop), or side effects.
    """
    program = trace(fn, abstract_args)
    return _assemble(fn, program, cut_program(program))


def _assemble(fn: Callable[..., Any], program: Program, cut: Cut) -> Sliced:
    attentions = tuple(_attention(program, i) for i in range(len(program.attentions)))
    functions: dict[Hashable, StageFn] = {}
    arguments = {j: Port("argument", j) for j in range(program.num_args)}
    sources: dict[int, Port] = arguments
    slices = []
    for i, attention_op in enumerate(program.attentions):
        slices.append(_slice(program, i, attentions[i], cut, sources, functions))
        carried = {value: Port("carried", j) for j, value in enumerate(cut.carried[i])}
        (output,) = program.ops[attention_op].writes
        sources = {**arguments, **carried, output: Port("attention")}
    results = [(Port("result", j), atom) for j, atom in enumerate(program.outputs)]
    last = build_stage(program, sources, results, functions)
    carried_structs = (tuple(map(program.struct, values)) for values in cut.carried)
    return Sliced((*slices, Slice((last,), last)), attentions, tuple(carried_structs), cut, fn, program)


def _slice(
    program: Program,
    i: int,
    op: Attention,
    cut: Cut,
    sources: dict[int, Port],
    functions: dict[Hashable, StageFn],
) -> Slice:
    """Slice i, which ends in attention `op`; what is at hand when it starts is in `sources`."""
    operands = program.operands(i)
    first: list[tuple[Port, Atom]] = [(Port("q"), operands.q)]
    if op.window == Port("window"):
        first.append((Port("window"), operands.window))
    second: list[tuple[Port, Atom]] = [(Port("k"), operands.k), (Port("v"), operands.v)]
    if op.sinks == Port("sinks") and operands.sinks is not None:
        second.append((Port("sinks"), operands.sinks))
    second += [(Port("carried", j), value) for j, value in enumerate(cut.carried[i])]

    ends = [atom for _, atom in first]
    ends += [value for value in cut.handed_on[i] if value not in ends]
    handed_on = {value: Port("stage1", ends.index(value)) for value in cut.handed_on[i]}
    ports = [port for port, _ in first] + [Port("stage1", j) for j in range(len(first), len(ends))]
    stage1 = build_stage(program, sources, list(zip(ports, ends, strict=True)), functions)
    stage2 = build_stage(program, sources | handed_on, second, functions)
    return Slice((stage1, stage2), build_stage(program, sources, first + second, functions))


def _attention(program: Program, i: int) -> Attention:
    op, operands = program.ops[program.attentions[i]], program.operands(i)

    def port(kind: str, atom: Atom) -> Port:
        return Port("argument", atom) if isinstance(atom, int) and atom < program.num_args else Port(kind)

    window = operands.window
    return Attention(
        q=program.struct(operands.q),
        k=program.struct(operands.k),
        v=program.struct(operands.v),
        o=program.struct(op.writes[0]),
        scale=op.eqn.params["scale"],
        softcap=op.eqn.params["softcap"],
        window=int(np.asarray(window.value)) if isinstance(window, Const) else port("window", window),
        sinks=None if operands.sinks is None else port("sinks", operands.sinks),
    )


def _plain(op: Attention, values: dict[Port, jax.Array]) -> jax.Array:
    return attention(
        values[Port("q")],
        values[Port("k")],
        values[Port("v")],
        scale=op.scale,
        window=values[op.window] if isinstance(op.window, Port) else op.window,
        softcap=op.softcap,
        sinks=None if op.sinks is None else values[op.sinks],
    )


def _check_same_operators(reference: Program, other: Program) -> None:
    """Raises where a cut of `reference` does not fit `other`."""
    if reference.signature == other.signature:
        return
    names, other_names = ([op.name for op in program.ops] for program in (reference, other))
    pairs = enumerate(zip_longest(names, other_names, fillvalue="nothing"))
    place, found = next(((j, pair) for j, pair in pairs if pair[0] != pair[1]), (None, None))
    where = (
        "they are wired differently" if found is None else f"operator {place} is {found[1]}, was {found[0]}"
    )
    raise ValueError(
        f"at these shapes the function calls other operators than those that were cut: {where}; cut it "
        "at these shapes on its own with slice_at_attention"
    )
