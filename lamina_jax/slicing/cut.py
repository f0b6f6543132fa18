"""Where a program is cut: what each boundary carries, and what a slice's first stage leaves its second.

Owns the order of the cuts and the minimum cut itself. Knows nothing of how a slice is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from lamina_jax.slicing.graph import INFINITE, Network, Region, is_cheap, network
from lamina_jax.slicing.trace import Atom, Const, Program

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
    levels = _levels(program)
    at_hand: tuple[int, ...] = ()
    carried, handed_on = [], []
    for i, attention in enumerate(program.attentions):
        values = _minimum(program, _boundary_region(program, levels, i, at_hand), solved)
        handed_on.append(_minimum(program, _stage_region(program, i, at_hand, values), solved))
        carried.append(values)
        at_hand = (*values, *program.ops[attention].writes)
    return Cut(tuple(carried), tuple(handed_on), len(solved))


def min_cut(net: Network) -> Set[int]:
    """The source's side of a minimum cut; of all minimum cuts, the one nearest the sink.

    Exact while the capacities divided by their greatest common divisor add up to less than 2^30.
    Beyond that they are rounded up to a unit of a 2^30th of their sum.
    """
    tails, heads, capacities = (np.array(column, dtype=object) for column in zip(*net.edges, strict=True))
    finite = capacities != INFINITE
    capacities[finite] = _scaled([int(c) for c in capacities[finite]])
    capacities[~finite] = int(capacities[finite].sum()) + 1
    index = (tails.astype(np.int32), heads.astype(np.int32))
    graph = csr_array((capacities.astype(np.int32), index), shape=(net.num_nodes, net.num_nodes))
    residual = csr_array(graph - maximum_flow(graph, 0, 1).flow)
    residual.eliminate_zeros()
    reach_sink = breadth_first_order(residual.T.tocsr(), 1, return_predecessors=False)
    return frozenset(range(net.num_nodes)) - set(reach_sink.tolist())


def _minimum(program: Program, region: Region, solved: dict[Network, Set[int]]) -> tuple[int, ...]:
    """The values, in program order, that cross the region's minimum cut."""
    net, numbers = network(program, region)
    if not net.edges:
        return ()
    if net not in solved:
        solved[net] = min_cut(net)
    before = solved[net]

    def computed_before(value: int, node: tuple[str, int]) -> bool:
        return numbers.get(node) in before and numbers.get(("value", value)) not in before

    crossing = [leaf for leaf in region.leaves if computed_before(leaf, ("source", 0))]
    for i in region.ops:
        crossing += [value for value in program.ops[i].writes if computed_before(value, ("op", i))]
    return tuple(sorted(crossing))


def _boundary_region(program: Program, levels: list[int], i: int, at_hand: tuple[int, ...]) -> Region:
    """Behind boundary i: all that depends on attention i, every later attention, and the return."""
    attention = program.attentions[i]
    behind = [op for j, op in enumerate(program.ops) if levels[j] >= i and j != attention]
    wanted = _values(atom for op in behind for atom in op.reads) | _values(program.outputs)
    wanted -= _values(value for op in (*behind, program.ops[attention]) for value in op.writes)
    operands = program.ops[attention].reads
    required = {j for j in program.ancestors(operands, at_hand) if not is_cheap(program.ops[j])}
    ops = program.ancestors([*operands, *wanted], at_hand)
    return Region(ops=ops, leaves=at_hand, required=required, wanted=wanted)


def _stage_region(program: Program, i: int, at_hand: tuple[int, ...], carried: tuple[int, ...]) -> Region:
    """Behind the first stage of slice i: every operator of the slice that q does not need.

    What is at hand when the slice starts is free to both stages.
    """
    q, k, v, window, sinks = program.operands(i)
    second = [k, v, *([] if sinks is None else [sinks]), *carried]
    ops = program.ancestors([q, window], at_hand)
    rest = set(program.ancestors(second, at_hand)).difference(ops)
    wanted = _values(second) | _values(atom for j in rest for atom in program.ops[j].reads)
    required = {j for j in ops if not is_cheap(program.ops[j])}
    return Region(ops=ops, leaves=(), required=required, wanted=wanted)


def _levels(program: Program) -> list[int]:
    """Of each operator: the last attention that it is or depends on; -1 for none."""
    of_value: dict[int, int] = {}
    levels = []
    for j, op in enumerate(program.ops):
        level = max((of_value.get(atom, -1) for atom in op.reads if not isinstance(atom, Const)), default=-1)
        if op.is_attention:
            level = program.attentions.index(j)
        levels.append(level)
        of_value.update(dict.fromkeys(op.writes, level))
    return levels


def _scaled(capacities: list[int]) -> list[int]:
    unit = gcd(*capacities) or 1
    if sum(capacities) // unit >= _LIMIT:
        unit = -(-sum(capacities) // _LIMIT)
    return [-(-capacity // unit) for capacity in capacities]


def _values(atoms: Iterable[Atom]) -> set[int]:
    return {atom for atom in atoms if not isinstance(atom, Const)}
