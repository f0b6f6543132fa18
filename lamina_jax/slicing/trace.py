"""From a JAX function to a flat program: one list of operators, nothing nested, nothing dead.

Owns tracing, who reads what, where the attentions are, and evaluating a list of operators again.
Knows nothing of costs, cuts or slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lamina_jax.slicing.operators import Atom, Const, Op, flatten


class Operands(NamedTuple):
    """What an attention operator reads, in its order."""

    q: Atom
    k: Atom
    v: Atom
    window: Atom
    sinks: Atom | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A function as operators over numbered values; values 0 .. num_args-1 are its argument leaves.

    Attributes:
        avals: shape and dtype of each value.
        num_args: argument leaves.
        ops: every operator that an output depends on, in the order in which the function calls them.
        outputs: the leaves of what the function returns.
        in_tree, out_tree: how arguments and outputs are put together from leaves.
    """

    avals: tuple[jax.core.ShapedArray, ...]
    num_args: int
    ops: tuple[Op, ...]
    outputs: tuple[Atom, ...]
    in_tree: jax.tree_util.PyTreeDef
    out_tree: jax.tree_util.PyTreeDef

    @cached_property
    def attentions(self) -> tuple[int, ...]:
        """Index into `ops` of each attention operator."""
        return tuple(i for i, op in enumerate(self.ops) if op.is_attention)

    def operands(self, i: int) -> Operands:
        """Of attention i."""
        return Operands(*self.ops[self.attentions[i]].reads)

    def struct(self, atom: Atom) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a value or a constant."""
        aval = atom.aval if isinstance(atom, Const) else self.avals[atom]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """The operators and who reads whom, without shapes: equal where the same cut is valid."""
        ops = tuple((op.name, _wiring(op.reads), op.writes) for op in self.ops)
        return (*ops, _wiring(self.outputs), self.in_tree, self.out_tree)

    @cached_property
    def _producers(self) -> dict[int, int]:
        return {value: i for i, op in enumerate(self.ops) for value in op.writes}

    def ancestors(self, wanted: Iterable[Atom], known: Container[int] = ()) -> list[int]:
        """The operators, in order, that compute `wanted` from the arguments and the `known` values."""
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            atom = stack.pop()
            if isinstance(atom, Const) or atom < self.num_args or atom in known:
                continue
            producer = self._producers[atom]
            if producer not in found:
                found.add(producer)
                stack.extend(self.ops[producer].reads)
        return sorted(found)

    def reads_arguments(self, value: int) -> bool:
        """Whether a value is an argument or depends on one."""
        read = [value] + [atom for i in self.ancestors([value]) for atom in self.ops[i].reads]
        return any(isinstance(atom, int) and atom < self.num_args for atom in read)


def trace(fn: Callable[..., Any], args: Sequence[Any]) -> Program:
    """The program of `fn` at the shapes and dtypes of `args` (pytrees of arrays or ShapeDtypeStructs).

    Raises:
        ValueError: an attention inside a loop or a branch, or side effects (a print, a callback).
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    if closed.effects:
        raise ValueError(
            f"cannot slice a function with side effects, found {sorted(map(str, closed.effects))}: "
            "take prints and callbacks out of it"
        )
    in_tree, out_tree = jax.tree.structure(tuple(args)), jax.tree.structure(out_shape)
    avals, ops, outputs = flatten(closed)
    num_args = len(closed.jaxpr.invars)
    whole = Program(tuple(avals), num_args, tuple(ops), tuple(outputs), in_tree, out_tree)
    folded = dataclasses.replace(whole, ops=tuple(_fold_window(whole, op) for op in ops))
    live = folded.ancestors(outputs)
    return dataclasses.replace(folded, ops=tuple(folded.ops[i] for i in live))


def bind(eqn: JaxprEqn, operands: list[Any]) -> Any:
    """What an operator gives for its operands."""
    return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))


def evaluate(
    ops: Sequence[Op],
    known: Mapping[int, Any],
    wanted: Sequence[Atom],
    bind: Callable[[JaxprEqn, list[Any]], Any] = bind,
) -> tuple[jax.Array, ...]:
    """The `wanted` values, computed by `ops` one after the other from the `known` ones. Traceable.

    Args:
        bind: runs an operator; another one than `bind` may put something else in its place.
    """
    env = dict(known)
    for op in ops:
        operands = [atom.value if isinstance(atom, Const) else env[atom] for atom in op.reads]
        with op.eqn.ctx.manager:
            out = bind(op.eqn, operands)
        env.update(zip(op.writes, out if op.eqn.primitive.multiple_results else (out,), strict=True))
    return tuple(
        jnp.asarray(atom.value, atom.aval.dtype) if isinstance(atom, Const) else env[atom] for atom in wanted
    )


def _fold_window(program: Program, op: Op) -> Op:
    """A window that depends on no argument becomes a constant of the operator."""
    if not op.is_attention:
        return op
    operands = Operands(*op.reads)
    window = operands.window
    if isinstance(window, Const) or program.reads_arguments(window):
        return op
    ops = [program.ops[i] for i in program.ancestors([window])]
    (value,) = evaluate(ops, {}, [window])
    reads = (operands.q, operands.k, operands.v, Const(value, program.avals[window]), *op.reads[4:])
    return dataclasses.replace(op, reads=reads)


def _wiring(atoms: Sequence[Atom]) -> tuple[int | None, ...]:
    return tuple(None if isinstance(atom, Const) else atom for atom in atoms)
