"""Where a program is cut: what each boundary carries, and what a slice's first stage leaves its second.

Owns the order of the cuts and the minimum cut itself. Knows nothing of how a slice is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from lamina_jax.slicing.graph import CHEAP, INFINITE, Network, Region, network
from lamina_jax.slicing.operators import Atom
from lamina_jax.slicing.trace import Program

_LIMIT = 2**30
"""Largest sum of capacities that is given to the solver, whose arithmetic is int32."""


@dataclass(frozen=True)
class Cut:
    """A solved program.

    Attributes:
        carried: of each boundary: the values that cross it beside q, k, v and the output.
        handed_on: of each slice but the last: the values that its second stage takes from its first.
        solves: maximum-flow problems solved; like layers are solved once.
    """

    carried: tuple[tuple[int, ...], ...]
    handed_on: tuple[tuple[int, ...], ...]
    solves: int


def cut_program(program: Program) -> Cut:
    """Cut boundary after boundary, each through what the one before it left, then each slice in two.

    Boundary i works on the function of the arguments, the values carried over boundary i - 1 and the
    output of attention i - 1, so the cuts are nested whatever each of them chooses.
    """
    solved: dict[Network, Set[int]] = {}
    lives = _lives(program)
    at_hand: tuple[int, ...] = ()
    carried, handed_on = [], []
    for i, attention in enumerate(program.attentions):
        values = _minimum(program, _boundary_region(program, i, at_hand, lives), solved)
        handed_on.append(_minimum(program, _stage_region(program, i, at_hand, values), solved))
        carried.append(values)
        at_hand = (*values, *program.ops[attention].writes)
    return Cut(tuple(carried), tuple(handed_on), len(solved))


def min_cut(net: Network) -> Set[int]:
    """The source's side of a minimum cut; of all minimum cuts, the one nearest the sink.

    Exact while the capacities divided by their greatest common divisor add up to less than 2^30.
    Beyond that they are rounded up to a unit of a 2^30th of their sum.
    """
    tails, heads, capacities = zip(*net.edges, strict=True)
    scaled = np.array(_scaled(capacities), np.int32)
    graph = csr_array((scaled, (tails, heads)), shape=(net.num_nodes, net.num_nodes))
    residual = csr_array(graph - maximum_flow(graph, 0, 1).flow)
    residual.eliminate_zeros()
    reach_sink = breadth_first_order(residual.T.tocsr(), 1, return_predecessors=False)
    return frozenset(range(net.num_nodes)) - set(reach_sink.tolist())


def _minimum(program: Program, region: Region, solved: dict[Network, Set[int]]) -> tuple[int, ...]:
    """The values, in program order, that cross the region's minimum cut."""
    net, nodes = network(program, region)
    if not net.edges:
        return ()
    if net not in solved:
        solved[net] = min_cut(net)
    before = solved[net]
    crossing = {head for tail, head, _ in net.edges if tail in before and head not in before}
    return tuple(sorted(value for _, value in (nodes[head] for head in crossing)))


def _boundary_region(
    program: Program, i: int, at_hand: tuple[int, ...], lives: dict[int, tuple[int, int]]
) -> Region:
    """Behind boundary i: all that depends on attention i, every later attention, and the return."""
    operands = program.ops[program.attentions[i]].reads
    wanted = {value for value, (born, last_read) in lives.items() if born < i <= last_read}
    return Region(
        ops=program.ancestors([*operands, *wanted], at_hand),
        leaves=at_hand,
        required=_costly(program, program.ancestors(operands, at_hand)),
        wanted=wanted,
    )


def _stage_region(program: Program, i: int, at_hand: tuple[int, ...], carried: tuple[int, ...]) -> Region:
    """Behind the first stage of slice i: every operator of the slice that q does not need.

    What is at hand when the slice starts is free to both stages.
    """
    q, k, v, window, sinks = program.operands(i)
    second = [k, v, *([] if sinks is None else [sinks]), *carried]
    ops = program.ancestors([q, window], at_hand)
    rest = set(program.ancestors(second, at_hand)).difference(ops)
    wanted = {*second, *(atom for j in rest for atom in program.ops[j].reads)}
    return Region(ops=ops, leaves=(), required=_costly(program, ops), wanted=wanted)


def _costly(program: Program, ops: Iterable[int]) -> Set[int]:
    return {j for j in ops if program.ops[j].name not in CHEAP}


def _lives(program: Program) -> dict[int, tuple[int, int]]:
    """Of each value: the last attention it depends on (-1: none), the last boundary it is read behind.

    Behind boundary i lie the operators that depend on attention i or a later one, the later attentions
    themselves, and the return.
    """
    born: dict[Atom, int] = {}
    last_read: dict[Atom, int] = {}
    attentions = {j: i for i, j in enumerate(program.attentions)}
    for j, op in enumerate(program.ops):
        level = max((born.get(atom, -1) for atom in op.reads), default=-1)
        for atom in op.reads:
            last_read[atom] = max(last_read.get(atom, -1), attentions.get(j, level + 1) - 1)
        born.update(dict.fromkeys(op.writes, attentions.get(j, level)))
    last_read |= dict.fromkeys(program.outputs, len(attentions))
    return {value: (born[value], last_read.get(value, -1)) for op in program.ops for value in op.writes}


def _scaled(capacities: Sequence[int]) -> list[int]:
    finite = [capacity for capacity in capacities if capacity != INFINITE]
    unit = gcd(*finite) or 1
    if sum(finite) // unit >= _LIMIT:
        unit = -(-sum(finite) // _LIMIT)
    infinite = 1 + sum(-(-capacity // unit) for capacity in finite)
    return [infinite if capacity == INFINITE else -(-capacity // unit) for capacity in capacities]
