"""Operators over numbered values, read from jaxprs: nothing nested, and comparable by what they do.

Owns reading jaxprs: inlining calls, refusing attention in a loop or a branch, and the hashable form of
an operator. Knows nothing of what is read from what in a whole program.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from lamina_jax.ops import attention_p

_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Calls that mean their body, and the parameter that holds it. Derivative rules are dropped: the
slices are for inference."""


@dataclass(frozen=True, eq=False)
class Const:
    """A literal or an array that the function closes over: known when it is traced."""

    value: Any
    aval: jax.core.ShapedArray

    @cached_property
    def content(self) -> Hashable:
        """Equal for constants of equal dtype, shape and bits."""
        is_key = jnp.issubdtype(self.aval.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(self.value) if is_key else self.value)
        return self.aval, hashlib.sha256(array.tobytes()).hexdigest()


Atom = int | Const
"""What an operator reads: a value of the program, by number, or a constant."""


@dataclass(frozen=True, eq=False)
class Op:
    """One operator: `eqn` says what it does, `reads` and `writes` to which values of the program."""

    eqn: jex_core.JaxprEqn
    reads: tuple[Atom, ...]
    writes: tuple[int, ...]

    @cached_property
    def name(self) -> str:
        return self.eqn.primitive.name

    @cached_property
    def is_attention(self) -> bool:
        return self.eqn.primitive is attention_p

    @cached_property
    def meaning(self) -> Hashable:
        """Equal for operators that do the same, whatever values they do it to."""
        context = self.eqn.ctx
        setting = (context.compute_type, context.cur_abstract_mesh, context.xla_metadata)
        written = tuple(var.aval for var in self.eqn.outvars)
        return self.eqn.primitive, _frozen(self.eqn.params), _frozen(setting), written


def flatten(jaxpr: Any) -> tuple[list[Any], list[Op], list[Atom]]:
    """A jaxpr, open or closed, as (avals of its values, operators, outputs); its inputs come first.

    Raises:
        ValueError: attention inside an operator with a body of its own.
    """
    avals = [var.aval for var in getattr(jaxpr, "jaxpr", jaxpr).invars]
    ops: list[Op] = []
    outputs = _append(jaxpr, list(range(len(avals))), ops, avals)
    return avals, ops, outputs


def canonical(ops: Sequence[Op], inputs: Sequence[int], outputs: Sequence[Atom]) -> Hashable:
    """A list of operators with its values numbered by first appearance: equal for equal programs."""
    numbers: dict[Atom, int] = {value: number for number, value in enumerate(inputs)}
    rows: list[Hashable] = []
    for op in ops:
        reads = tuple([a.content if isinstance(a, Const) else numbers[a] for a in op.reads])
        for value in op.writes:
            numbers[value] = len(numbers)
        rows.append((op.meaning, reads))
    return (*rows, tuple([a.content if isinstance(a, Const) else numbers[a] for a in outputs]))


def _append(jaxpr: Any, args: Sequence[Atom], ops: list[Op], avals: list[Any]) -> list[Atom]:
    """Append the operators of `jaxpr` and of the calls inside it; returns its outputs."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[jex_core.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Const(value, var.aval)

    def read(atom: jex_core.Var | jex_core.Literal) -> Atom:
        return Const(atom.val, jax.typeof(atom.val)) if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        reads = [read(atom) for atom in eqn.invars]
        writes: Sequence[Atom]
        if eqn.primitive.name in _INLINED:
            writes = _append(eqn.params[_INLINED[eqn.primitive.name]], reads, ops, avals)
        else:
            _refuse_attention_inside(eqn)
            numbers = range(len(avals), len(avals) + len(eqn.outvars))
            avals.extend(var.aval for var in eqn.outvars)
            ops.append(Op(eqn, tuple(reads), tuple(numbers)))
            writes = numbers
        env.update(zip(eqn.outvars, writes, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _refuse_attention_inside(eqn: jex_core.JaxprEqn) -> None:
    if any(_has_attention(jaxpr) for jaxpr in jex_core.jaxprs_in_params(eqn.params)):
        raise ValueError(
            f"attention inside {eqn.primitive.name!r} cannot be sliced: a cut through one operator of a "
            "program has no place in a body that runs several times, or not at all; write a Python loop "
            "over layers"
        )


def _has_attention(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is attention_p or any(map(_has_attention, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _frozen(value: Any) -> Hashable:
    """A parameter of an operator in hashable form: equal by value where its type allows it.

    A type that compares by identity makes unlike what could be one program, never the other way round.
    """
    kind = type(value)
    if isinstance(value, tuple | list):
        return kind, tuple(map(_frozen, value))
    if isinstance(value, Mapping):
        return kind, tuple((name, _frozen(value[name])) for name in sorted(value, key=str))
    if isinstance(value, jex_core.Jaxpr | jex_core.ClosedJaxpr):
        avals, ops, outputs = flatten(value)
        inputs = range(len(getattr(value, "jaxpr", value).invars))
        return kind, tuple(avals[: len(inputs)]), canonical(ops, inputs, outputs)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, tuple(_frozen(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, np.ndarray | jax.Array):
        return kind, Const(value, jax.typeof(value)).content
    try:
        hash(value)
    except TypeError:
        return kind, _Identity(value)
    return kind, value


@dataclass(frozen=True, eq=False)
class _Identity:
    """Keeps an unhashable value alive and stands for it: equal to itself only."""

    value: Any
