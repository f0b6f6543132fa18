"""Random programs: the cut against brute force, and the slices against the function itself."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from slicing_helpers import (
    COSTLY,
    Runner,
    fewest_bytes_carried,
    fewest_bytes_handed_on,
    num_bytes,
    recipe_args,
    recipes,
    run_recipe,
)

from lamina_jax import slice_at_attention
from lamina_jax.slicing import Sliced
from lamina_jax.slicing.trace import Program, trace

quietly = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sliced_and_program(steps) -> tuple[Sliced, Program]:
    fn = partial(run_recipe, steps)
    return slice_at_attention(fn, *recipe_args()), trace(fn, recipe_args())


@quietly(max_examples=50)
@given(recipes())
def test_no_valid_cut_carries_fewer_bytes(steps):
    sliced, program = sliced_and_program(steps)
    assume(len(program.ops) <= 12)
    at_hand: set[int] = set()
    for i, carried in enumerate(sliced.cut.carried):
        assert num_bytes(program, carried) == fewest_bytes_carried(program, i, at_hand)
        handed_on = sliced.cut.handed_on[i]
        assert num_bytes(program, handed_on) == fewest_bytes_handed_on(program, i, at_hand, carried)
        at_hand = {*carried, *program.ops[program.attentions[i]].writes}


@quietly(max_examples=50)
@given(recipes(max_ops=20, max_attentions=4))
def test_every_costly_operator_runs_once(steps):
    sliced, program = sliced_and_program(steps)
    wanted = Counter(op.name for op in program.ops if op.name in COSTLY)
    staged = [stage for piece in sliced.slices for stage in piece.stages]
    for stages in (staged, [piece.fused for piece in sliced.slices]):
        ran = Counter(name for stage in stages for name in stage.operators)
        assert {name: ran[name] for name in COSTLY if ran[name]} == wanted
        assert "lamina_attention" not in ran


@quietly(max_examples=15)
@given(recipes(max_ops=14, max_attentions=3))
def test_slices_compose_to_the_function_bit_for_bit(steps):
    fn, args = partial(run_recipe, steps), recipe_args()
    expected, got = fn(*args), slice_at_attention(fn, *args)(*args)
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@quietly(max_examples=10)
@given(recipes(max_ops=10))
def test_jitted_stages_and_fused_slices_compute_the_function(steps):
    fn, args = partial(run_recipe, steps), recipe_args()
    sliced, expected = slice_at_attention(fn, *args), jax.tree.leaves(fn(*args))
    for fused in (False, True):
        for got, wanted in zip(Runner(sliced, fused=fused)(*args), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
