"""What the tests of the converter share: random programs, a brute-force oracle, and a flat runner."""

from __future__ import annotations

from itertools import combinations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from lamina_jax import attention
from lamina_jax.slicing import Port, Sliced
from lamina_jax.slicing.trace import Program

COSTLY = {"dot_general", "cumsum", "sort", "gather"}
WIDTHS = (2, 4, 8)
TOKENS = 3

Step = tuple[str, int, int, int]
_KINDS = ("tanh", "add", "join", "half", "split", "dot", "dot", "cumsum", "sort")


@st.composite
def recipes(draw: st.DrawFn, max_ops: int = 10, max_attentions: int = 2) -> list[Step]:
    """Steps of a random program: its kind and three numbers that choose operands."""
    number = st.integers(0, 30)
    steps = draw(st.lists(st.tuples(st.sampled_from(_KINDS), number, number, number), max_size=max_ops))
    for _ in range(draw(st.integers(1, max_attentions))):
        place = draw(st.integers(0, len(steps)))
        steps.insert(place, ("attention", draw(number), draw(number), draw(number)))
    return steps


def run_recipe(steps: list[Step], x: jax.Array, weights: dict[str, jax.Array]) -> dict[str, Any]:
    """Every value is f32[TOKENS, 1, width], so that each step is one operator."""
    values = [x]
    outputs = []
    for kind, first, second, third in steps:
        a = values[-1 - first % len(values)]
        width = a.shape[-1]
        alike = [value for value in values if value.shape == a.shape]
        b, c = alike[second % len(alike)], alike[third % len(alike)]
        if kind == "attention":
            values.append(attention(a, b, c, scale=0.5))
            outputs.append(values[-1])
        elif kind == "add":
            values.append(lax.add(a, b))
        elif kind == "join" and 2 * width in WIDTHS:
            values.append(lax.concatenate([a, b], 2))
        elif kind == "half" and width // 2 in WIDTHS:
            values.append(lax.slice_in_dim(a, 0, width // 2, axis=2))
        elif kind == "split" and width // 2 in WIDTHS:
            values.extend(lax.split(a, (width // 2, width // 2), axis=2))
        elif kind == "dot":
            weight = weights[f"{width}x{WIDTHS[third % len(WIDTHS)]}"]
            values.append(lax.dot_general(a, weight, (((2,), (0,)), ((), ()))))
        elif kind == "cumsum":
            values.append(lax.cumsum(a, axis=0))
        elif kind == "sort":
            values.extend(lax.sort((a, b), dimension=2, num_keys=1))
        else:
            values.append(lax.tanh(a))
    return {"last": tuple(values[-4:]), "attended": outputs}


def recipe_args(key: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    draw = np.random.default_rng(key)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape).astype(np.float32))

    return normal(TOKENS, 1, 4), {f"{m}x{n}": normal(m, n) for m in WIDTHS for n in WIDTHS}


def fewest_bytes_carried(program: Program, i: int, at_hand: set[int]) -> int:
    """Over boundary i, by trying every set of values; `at_hand`: carried before, and o of i - 1."""
    hole = program.ops[program.attentions[i]]
    after = set(hole.writes)
    reads = list(program.outputs)
    for j, op in enumerate(program.ops):
        later = j in program.attentions[i + 1 :]
        if op is not hole and (later or any(read in after for read in op.reads)):
            after |= set(op.writes)
            reads += op.reads
    behind = [read for read in reads if read not in after]
    _, _, values = _walk(program, [*hole.reads, *behind], at_hand)

    def valid(carried: set[int]) -> bool:
        before, _, _ = _walk(program, [*hole.reads, *carried], at_hand)
        again, touched, _ = _walk(program, behind, at_hand | carried)
        return touched <= carried and not before & again

    return _fewest(program, values, valid)


def fewest_bytes_handed_on(program: Program, i: int, at_hand: set[int], carried: tuple[int, ...]) -> int:
    """From the first stage of slice i to the second, by trying every set of values."""
    q, k, v, *_ = program.ops[program.attentions[i]].reads
    costly, _, values = _walk(program, [q], at_hand)

    def valid(handed_on: set[int]) -> bool:
        again, _, _ = _walk(program, [k, v, *carried], at_hand | handed_on)
        return not costly & again

    return _fewest(program, values - at_hand, valid)


def num_bytes(program: Program, values: Any) -> int:
    return sum(prod(program.avals[v].shape) * program.avals[v].dtype.itemsize for v in values)


def _walk(program: Program, roots: Any, stop: set[int]) -> tuple[set[int], set[int], set[int]]:
    """Backwards from `roots` to `stop`: costly operators met, members of `stop` met, values met."""
    producer = {value: j for j, op in enumerate(program.ops) for value in op.writes}
    costly, touched, values, todo = set(), set(), set(), list(roots)
    while todo:
        value = todo.pop()
        if not isinstance(value, int) or value < program.num_args or value in values:
            continue
        values.add(value)
        if value in stop:
            touched.add(value)
            continue
        op = program.ops[producer[value]]
        if op.name in COSTLY:
            costly.add(producer[value])
        values |= {other for other in op.writes if other not in stop}
        todo += op.reads
    return costly, touched, values


def _fewest(program: Program, values: set[int], valid: Any) -> int:
    subsets = (set(chosen) for size in range(len(values) + 1) for chosen in combinations(values, size))
    for chosen in sorted(subsets, key=lambda chosen: num_bytes(program, chosen)):
        if valid(chosen):
            return num_bytes(program, chosen)
    raise AssertionError("no set of values is a valid cut")


class Runner:
    """Runs a sliced function from its ports alone, as a decode loop does: one jit per stage key."""

    def __init__(self, sliced: Sliced, *, fused: bool) -> None:
        self.sliced, self.fused, self.programs = sliced, fused, {}

    def __call__(self, *args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        carried: dict[int, jax.Array] = {}
        o = None
        for i, piece in enumerate(self.sliced.slices):
            done: dict[Port, jax.Array] = {}
            stage1: tuple[jax.Array, ...] = ()
            for stage in (piece.fused,) if self.fused else piece.stages:
                find = {"argument": leaves, "carried": carried, "attention": [o], "stage1": stage1}
                stage1 = self._program(stage)(*(find[port.kind][port.index] for port in stage.inputs))
                done |= dict(zip(stage.outputs, stage1, strict=True))
            if i == len(self.sliced.attentions):
                return [done[Port("result", j)] for j in range(len(done))]
            hole = self.sliced.attentions[i]
            carried = {port.index: value for port, value in done.items() if port.kind == "carried"}
            assert [(a.shape, a.dtype) for _, a in sorted(carried.items())] == [
                (a.shape, a.dtype) for a in self.sliced.carried[i]
            ]
            extra = {
                name: leaves[port.index] if port.kind == "argument" else done[port]
                for name, port in (("window", hole.window), ("sinks", hole.sinks))
                if isinstance(port, Port)
            }
            window = extra.pop("window", hole.window)
            q, k, v = (done[Port(name)] for name in "qkv")
            o = attention(q, k, v, scale=hole.scale, softcap=hole.softcap, window=window, **extra)
        raise AssertionError("a sliced function ends in a slice")

    def _program(self, stage: Any) -> Any:
        return self.programs.setdefault(stage.key, jax.jit(stage.fn))
