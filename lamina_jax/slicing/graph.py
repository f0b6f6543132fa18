"""What may be computed twice, and the flow network whose minimum cut is what a boundary carries.

Owns the classes of operators and the construction of the network. Knows nothing of attention: a
boundary is given as a `Region`, which operators lie before it and which values are read behind it.

The network of a region (paper 4.2, made precise): every operator and every value is a node.

- operator -> value it writes, capacity = the value's bytes: cut means "computed before, carried".
  A value is paid once however many operators read it.
- value -> operator that reads it, infinite: who is computed behind the boundary needs its operands
  behind the boundary, carried or computed there.
- operator -> each nearest costly ancestor (through cheap ones), infinite: what is computed before
  needs its costly ancestors before. With this a costly operator runs on one side only. No edge leads
  to a cheap ancestor: it may run on both sides.
- source -> required operator, infinite; source -> leaf value, capacity = bytes; value read behind
  the boundary -> sink, infinite.

Arguments and constants are no nodes: they are free on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import prod

from lamina_jax.slicing.operators import Atom, Const
from lamina_jax.slicing.trace import Program

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp clz
    complex conj convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt imag integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter not
    optimization_barrier or population_count pow real reduce_precision rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor
"""
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
_SHAPES = "broadcast_in_dim concatenate iota pad reshape rev slice split squeeze transpose"

CHEAP = frozenset((_ELEMENTWISE + _REDUCTIONS + _SHAPES).split())
"""Operators that may run in several slices. Any other is costly and runs once: products, gathers,
scatters, sorts, scans, loops, random numbers, kernels, and whatever this list does not know."""

INFINITE = -1
"""The capacity of an edge that no cut may cross."""

Node = tuple[str, int]
SOURCE: Node = ("source", 0)
SINK: Node = ("sink", 0)


@dataclass(frozen=True)
class Region:
    """What one boundary is cut through.

    Attributes:
        ops: the operators in front of what lies behind the boundary for certain, in program order.
        leaves: values at hand that cost their bytes to carry and cannot be recomputed.
        required: costly operators that must run before the boundary.
        wanted: what is read behind it; only what is at hand or written in the region counts.
    """

    ops: Sequence[int]
    leaves: Sequence[int]
    required: Set[int]
    wanted: Set[Atom]


@dataclass(frozen=True)
class Network:
    """Edges (tail, head, capacity); node 0 is the source, 1 the sink. Equal for like regions."""

    num_nodes: int
    edges: tuple[tuple[int, int, int], ...]


def network(program: Program, region: Region) -> tuple[Network, list[Node]]:
    """The part of the region's network that the source reaches, and what each of its nodes is.

    What the source does not reach is computed from arguments alone and can wait: it lies behind.
    Nodes are numbered in program order, so that the network of every like layer is equal.
    """
    edges = _edges(program, region)
    reached = _reachable(edges)
    numbers: dict[Node, int] = {SOURCE: 0, SINK: 1}
    kept = []
    for (tail, head), capacity in edges.items():
        if tail in reached:
            tail_number = numbers.setdefault(tail, len(numbers))
            kept.append((tail_number, numbers.setdefault(head, len(numbers)), capacity))
    return Network(len(numbers), tuple(kept)), list(numbers)


def _edges(program: Program, region: Region) -> dict[tuple[Node, Node], int]:
    edges: dict[tuple[Node, Node], int] = {}
    nearest: dict[int, frozenset[int]] = {}  # of each value: the costly operators it hangs on

    def add_value(tail: Node, value: int) -> None:
        aval = program.avals[value]
        edges[tail, ("value", value)] = prod(aval.shape) * aval.dtype.itemsize
        if value in region.wanted:
            edges[("value", value), SINK] = INFINITE

    for leaf in region.leaves:
        nearest[leaf] = frozenset()
        add_value(SOURCE, leaf)
    for i in region.ops:
        op, node = program.ops[i], ("op", i)
        reads = [a for a in op.reads if not isinstance(a, Const) and a in nearest]
        costly_ancestors = frozenset().union(*(nearest[value] for value in reads))
        if i in region.required:
            edges[SOURCE, node] = INFINITE
        for value in reads:
            edges[("value", value), node] = INFINITE
        for ancestor in sorted(costly_ancestors):
            edges[node, ("op", ancestor)] = INFINITE
        for value in op.writes:
            nearest[value] = costly_ancestors if op.name in CHEAP else frozenset([i])
            add_value(node, value)
    return edges


def _reachable(edges: dict[tuple[Node, Node], int]) -> set[Node]:
    heads = defaultdict(list)
    for tail, head in edges:
        heads[tail].append(head)
    reached, stack = {SOURCE}, [SOURCE]
    while stack:
        for head in heads[stack.pop()]:
            if head not in reached:
                reached.add(head)
                stack.append(head)
    return reached
