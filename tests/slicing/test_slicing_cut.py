"""The minimum cut alone, and the lists that it hangs on."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import primitives

from lamina_jax.slicing.cut import min_cut
from lamina_jax.slicing.graph import CHEAP, INFINITE, Network

NODES = 6


@st.composite
def networks(draw: st.DrawFn, unit: int) -> list[tuple[int, int, int]]:
    """Random edges, some infinite, but none into the sink (1)."""
    capacities = st.integers(0, 9).map(lambda n: n * unit)
    pairs = [(a, b) for a in range(NODES) for b in range(NODES) if a not in (1, b) and b != 0]
    chosen = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=14, unique=True))
    return [(a, b, INFINITE if b != 1 and draw(st.booleans()) else draw(capacities)) for a, b in chosen]


def cost(edges: list[tuple[int, int, int]], side: set[int]) -> float:
    cut = [c for a, b, c in edges if a in side and b not in side]
    return float("inf") if INFINITE in cut else sum(cut)


@pytest.mark.parametrize("unit", [1, 2**27 + 1, 2**45])
def test_the_cut_is_the_largest_minimal_one(unit):
    @settings(max_examples=60, deadline=None)
    @given(networks(unit))
    def check(edges: list[tuple[int, int, int]]) -> None:
        others = range(2, NODES)
        sides = [{0, *chosen} for size in range(NODES - 1) for chosen in combinations(others, size)]
        least = min(cost(edges, side) for side in sides)
        largest = set().union(*(side for side in sides if cost(edges, side) == least))
        assert min_cut(Network(NODES, tuple(edges))) == largest

    check()


def test_capacities_without_a_common_unit_are_rounded_not_overflowed():
    edges = ((0, 2, 2**40 + 1), (2, 3, INFINITE), (3, 1, 2**40 - 2**20), (2, 1, 3))
    assert min_cut(Network(4, edges)) == {0, 2, 3}
    edges = ((0, 2, 2**40 - 2**20), (2, 3, INFINITE), (3, 1, 2**40 + 1), (2, 1, 3))
    assert min_cut(Network(4, edges)) == {0}


@pytest.mark.parametrize("unit", [1, 2**45 + 1])
def test_sums_that_are_equal_stay_equal(unit):
    edges = ((0, 2, 7 * unit), (2, 3, 3 * unit), (2, 4, 4 * unit), (3, 1, INFINITE), (4, 1, INFINITE))
    assert min_cut(Network(5, edges)) == {0, 2}


def test_every_cheap_operator_is_a_primitive_of_jax():
    known = {getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")}
    assert CHEAP - known <= {"add_any", "copy", "name", "optimization_barrier", "split", "square"}
    assert not CHEAP & {"dot_general", "gather", "scan", "sort", "cumsum", "dynamic_slice", "random_bits"}
