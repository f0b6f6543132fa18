"""Models of many shapes, cut: what they carry, and that the slices are still the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from slicing_helpers import Runner
from toy_models import (
    D,
    H,
    K,
    N,
    T,
    attend,
    decoder_block,
    inputs,
    mlp,
    model,
    parallel_block,
    qkv,
    rms_norm,
    rotation,
    two_in_parallel,
    two_in_sequence,
    weights,
)

from lamina_jax import attention, slice_at_attention
from lamina_jax.ops import NO_WINDOW
from lamina_jax.slicing import Port, Sliced

RESIDUAL = (T, D)


def check(fn, *args) -> Sliced:
    """Slice, and compare the stages one after the other, and the fused slices, with the function."""
    sliced = slice_at_attention(fn, *args)
    fused = Runner(sliced, fused=True)
    expected, staged, fused = jax.jit(lambda *args: (fn(*args), sliced(*args), fused(*args)))(*args)
    assert jax.tree.structure(expected) == jax.tree.structure(staged)
    for got in (staged, fused):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            tolerance = 1e-5 if a.dtype == np.float32 else 5e-2
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)
    return sliced


def carried_shapes(sliced: Sliced) -> list[list[tuple[int, ...]]]:
    return [[array.shape for array in boundary] for boundary in sliced.carried]


@pytest.mark.parametrize(
    ("block", "attentions"),
    [(decoder_block, 2), (parallel_block, 2), (two_in_sequence, 4)],
)
def test_a_block_with_one_residual_stream_carries_nothing_else(block, attentions):
    sliced = check(model(block), weights(2), *inputs())
    assert len(sliced.slices) == attentions + 1
    assert carried_shapes(sliced) == [[RESIDUAL]] * attentions


def test_parallel_attentions_on_one_input():
    sliced = check(model(two_in_parallel), weights(2), *inputs())
    # Behind the first, x still has to give the second's q, k, v and the sum: fewer bytes than any of them.
    assert carried_shapes(sliced) == [[RESIDUAL]] * 4
    assert [op.window for op in sliced.attentions] == [NO_WINDOW, 2] * 2


def test_bf16():
    sliced = check(model(decoder_block), weights(2, jnp.bfloat16), *inputs())
    assert all(array.dtype == jnp.bfloat16 for boundary in sliced.carried for array in boundary)
    assert sliced.attentions[0].q.dtype == jnp.bfloat16


def test_an_attention_output_used_twice():
    def block(layer, x, turn):
        o = attention(*qkv(layer, x, turn), scale=1.0).reshape(T, -1)
        second = attend(layer, o @ layer["o"], turn)
        return second + o @ layer["o"]

    sliced = check(model(block), weights(1), *inputs())
    assert carried_shapes(sliced) == [[], [RESIDUAL]]

    def twice(layer, x, turn):
        o = attention(*qkv(layer, x, turn), scale=1.0)
        return attend(layer, x, turn) + jnp.tanh(o).reshape(T, -1) @ layer["o"]

    sliced = check(model(twice), weights(1), *inputs())
    assert carried_shapes(sliced)[0] == [RESIDUAL]


def test_k_and_v_shared_by_two_layers():
    def fn(params, tokens, positions):
        x, turn = params["embed"][tokens], rotation(positions)
        first, second = params["layers"]
        q, k, v = qkv(first, x, turn)
        x = x + attention(q, k, v, scale=1.0).reshape(T, -1) @ first["o"]
        q, _, _ = qkv(second, x, turn)
        return x + attention(q, k, v, scale=1.0).reshape(T, -1) @ second["o"]

    sliced = check(fn, weights(2), *inputs())
    # Both kept from the first layer, or one of them and what the other comes from: never more.
    assert carried_shapes(sliced) == [[RESIDUAL, (T, K, H), (T, K, H)], [RESIDUAL]]


def test_two_residual_streams():
    def block(layer, streams, turn):
        a, b = streams
        a = a + attend(layer, b, turn)
        return b + mlp(layer, a), a

    def fn(params, tokens, positions):
        streams = (params["embed"][tokens], params["embed"][tokens + 1])
        for layer in params["layers"]:
            streams = block(layer, streams, rotation(positions))
        return streams

    sliced = check(fn, weights(4), *inputs())
    # The first attention does not need a, whose embedding is looked up behind it.
    assert carried_shapes(sliced) == [[RESIDUAL], *[[RESIDUAL, RESIDUAL]] * 3]
    assert len({piece.fused.key for piece in sliced.slices}) == 4


def test_no_attention_is_one_slice():
    sliced = check(mlp, weights(1)["layers"][0], jnp.ones((T, D)))
    assert (len(sliced.slices), sliced.carried, sliced.attentions) == (1, (), ())
    assert sliced.cut.solves == 0


def test_attention_inside_calls_is_found():
    @jax.custom_vjp
    def scaled(x):
        return 2 * x

    scaled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    @jax.jit
    def block(layer, x, turn):
        return scaled(jax.checkpoint(jax.jit(decoder_block))(layer, jax.nn.relu(x), turn))

    sliced = check(model(block), weights(3), *inputs())
    assert carried_shapes(sliced) == [[RESIDUAL]] * 3
    assert len({piece.fused.key for piece in sliced.slices}) == 3


def test_attention_inside_loops_and_branches_is_refused():
    x = jnp.ones((T, N, H))

    def attend_once(x):
        return attention(x, x, x, scale=1.0)

    def scan(x):
        return lax.scan(lambda x, _: (jax.jit(attend_once)(x), None), x, None, length=2)

    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 9, attend_once, x)

    def branch(x):
        return lax.cond(
            x.sum() > 0, attend_once, lambda x: lax.scan(lambda x, _: (x, None), x, length=2)[0], x
        )

    for fn, name in ((scan, "scan"), (loop, "while"), (branch, "cond")):
        with pytest.raises(ValueError, match=rf"inside '{name}'.*write a Python loop"):
            slice_at_attention(fn, x)


def test_side_effects_are_refused():
    def fn(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(ValueError, match="side effects"):
        slice_at_attention(fn, jnp.ones(3))


def test_pytrees_constants_and_arguments_as_outputs():
    def fn(batch, pair):
        x = batch["x"]
        o = attention(x, x, batch["deep"][0], scale=1.0)
        return {"o": o, "same": x, "one": 1.0, "table": np.arange(3), "none": None}, [pair[1], o + pair[0]]

    x = jnp.ones((T, N, H))
    sliced = check(fn, {"x": x, "deep": [2 * x]}, (x, jnp.zeros((), np.int32)))
    assert carried_shapes(sliced) == [[]]
    q, k = (Port(name) for name in "qk")
    assert sliced.slices[0].fused.outputs[:2] == (q, k)
    assert sliced.slices[0].fused.operators == ()


def test_a_carry_that_passes_through():
    def fn(x, w):
        early = jnp.tanh(x.reshape(T, -1) @ w)
        for _ in range(3):
            x = attention(x, x, x, scale=1.0)
        return x, early

    sliced = check(fn, jnp.ones((T, N, H)), jnp.ones((N * H, D)))
    # Computed from arguments alone, so it can wait for the last slice.
    assert carried_shapes(sliced) == [[], [], []]

    def early_bird(x, w):
        early = (x.reshape(T, -1) @ w)[:, :1]
        x = x + early[:, :, None]
        for _ in range(3):
            x = attention(x, x, x, scale=1.0)
        return x, early

    sliced = check(early_bird, jnp.ones((T, N, H)), jnp.ones((N * H, D)))
    assert carried_shapes(sliced) == [[(T, 1)]] * 3


def test_windows_and_sinks_are_constants_arguments_or_outputs():
    def fn(params, x, window, windows):
        layer, o = params["layers"][0], jnp.asarray(3) - 1
        for options in (
            {"window": o},
            {"window": window, "sinks": layer["sinks"]},
            {"window": windows[1] + 1, "sinks": jnp.tanh(layer["sinks"]), "softcap": 5.0},
            {"sinks": jnp.asarray(np.ones(N, np.float32))},
        ):
            x = x + attend(layer, x, rotation(jnp.arange(T)), **options)
        return x

    args = (weights(1), jnp.ones(RESIDUAL), jnp.int32(3), jnp.asarray([5, 2], np.int32))
    ops = check(fn, *args).attentions
    leaf = {id(value): j for j, value in enumerate(jax.tree.leaves(args))}
    sinks = Port("argument", leaf[id(args[0]["layers"][0]["sinks"])])
    assert [op.window for op in ops] == [2, Port("argument", leaf[id(args[2])]), Port("window"), NO_WINDOW]
    assert [op.sinks for op in ops] == [None, sinks, Port("sinks"), Port("sinks")]
    assert [(op.softcap, op.has_sinks) for op in ops] == [
        (None, False),
        (None, True),
        (5.0, True),
        (None, True),
    ]


def test_cheap_values_of_the_arguments_are_computed_again_and_costly_ones_are_carried():
    table = np.asarray(np.random.default_rng(0).normal(size=(9, H // 2)), np.float32)

    def fn(params, tokens, positions):
        x, turn = params["embed"][tokens], (jnp.asarray(table)[positions], jnp.asarray(table)[positions])
        for layer in params["layers"]:
            x = decoder_block(layer, x, turn)
        return x

    angles = (T, H // 2)
    assert sorted(carried_shapes(check(fn, weights(2), *inputs()))[0]) == sorted([RESIDUAL, angles, angles])


@pytest.mark.parametrize("costly", [True, False])
def test_what_is_computed_before_has_its_costly_ancestors_before(costly):
    """w hangs on y, which the attention needs, and on u, which could be computed behind."""

    def fn(a, small, big, other):
        x = a @ small
        y, u = x @ big, x @ other
        w = lax.dot_general(y, u, (((1,), (1,)), ((0,), (0,)))) if costly else (y + u)[:, 0]
        q = y[:, None, :]
        return attention(q, q, q, scale=1.0), x, u, w

    shapes = [(4, 4), (4, 2), (2, 8), (2, 8)]
    sliced = check(fn, *(jnp.asarray(np.random.default_rng(0).normal(size=s), np.float32) for s in shapes))
    # x and w alone would be fewer bytes, but then u would be computed on both sides.
    assert carried_shapes(sliced) == [[(4, 2), (4, 8)]]


def test_a_free_costly_operator_runs_where_it_carries_less():
    def fn(params, x, wide):
        x = x @ params["k"]  # leaves no argument to compute from
        before = attend(params, x @ params["k"].T, rotation(jnp.arange(T)))
        return (before, (x @ wide)[:, :1]) if wide.shape[1] == 1 else (before, x @ wide)

    layer = weights(1)["layers"][0]
    narrow = slice_at_attention(fn, layer, jnp.ones(RESIDUAL), jnp.ones((K * H, 1)))
    wide = slice_at_attention(fn, layer, jnp.ones(RESIDUAL), jnp.ones((K * H, 99)))
    assert carried_shapes(narrow) == [[(T, 1)]]
    assert carried_shapes(wide) == [[(T, K * H)]]


def test_like_layers_share_stages_and_solves():
    params = jax.eval_shape(lambda: weights(80))
    sliced = slice_at_attention(model(decoder_block), params, *inputs())
    assert carried_shapes(sliced) == [[RESIDUAL]] * 80
    assert sliced.cut.solves <= 4
    assert len({piece.fused.key for piece in sliced.slices}) == 3
    assert len({piece.stages[0].key for piece in sliced.slices}) == 3
    assert sliced.slices[1].stages[1].fn is sliced.slices[79].stages[1].fn
    assert sliced.slices[1].stages[1].inputs != sliced.slices[79].stages[1].inputs


def distinct_layers(*layers) -> int:
    """How many kinds of slices there are between the attentions of `x = layer(attention(x))`."""

    def fn(x):
        for layer in layers:
            x = layer(attention(x, x, x, scale=1.0))
        return x

    return len({piece.fused.key for piece in check(fn, jnp.ones((T, N, 6))).slices[1:-1]})


def scan_of(body):
    return lambda x: lax.scan(lambda x, _: (body(x), None), x, None, length=2)[0]


def kernel(x):
    def double(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    block = pl.BlockSpec((2, N, 6), lambda i: (i, 0, 0))
    out_shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        double, out_shape, grid=(T // 2,), in_specs=[block], out_specs=block, interpret=True
    )(x)


def scaled_by(*scale):
    return lambda x: x * np.float32(scale)[None, :, None]


def crossed(swap):
    """Two programs of the same operators that differ in who reads whom."""

    def layer(x):
        a, b, c = jnp.split(x, 3, axis=2)
        a, b = jnp.tanh(a), jnp.tanh(b)
        return jnp.concatenate([a + c, b, c] if swap else [a + b, c, c], axis=2)

    return layer


def test_stages_are_alike_where_they_are_the_same_program():
    same = (scaled_by(1, 2, 3, 4), scan_of(jax.nn.relu), lambda x: x**3, crossed(swap=True), kernel)
    for layer in same:
        assert distinct_layers(layer, layer, layer, layer) == 1
    # Every layer but the last stands before an attention.
    assert distinct_layers(scaled_by(1, 1, 1, 1), scaled_by(1, 1, 1, 2), scaled_by(1, 1, 1, 1), same[0]) == 2
    assert distinct_layers(scan_of(jax.nn.relu), scan_of(jnp.tanh), scan_of(jax.nn.relu), same[0]) == 2
    assert distinct_layers(lambda x: x**3, lambda x: x**4, same[0]) == 2
    assert distinct_layers(crossed(swap=True), crossed(swap=False), same[0]) == 2


def test_q_k_and_v_may_be_one_value():
    def fn(x, w):
        q = (x @ w).reshape(T, N, H)
        return attention(q, q, q, scale=1.0)

    first, second = check(fn, jnp.ones((T, D)), jnp.ones((D, N * H))).slices[0].stages
    assert first.outputs == (Port("q"),)
    assert (second.inputs, second.operators) == ((Port("stage1", 0),), ())


def test_other_shapes_reuse_the_cut():
    fn, params = model(decoder_block), weights(2)
    sliced = slice_at_attention(fn, params, *inputs())
    other = sliced.at(params, *inputs(tokens=9))
    assert other.cut is sliced.cut
    assert carried_shapes(other) == [[(9, D)]] * 2
    got, wanted = jax.jit(lambda *args: (other(*args), fn(*args)))(params, *inputs(9))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert carried_shapes(sliced.at(params, *inputs(tokens=1))) == [[(1, D)]] * 2
    with pytest.raises(ValueError, match=r"other operators.*slice_at_attention"):
        sliced.at(weights(3), *inputs())


def test_arguments_that_do_not_fit_are_refused():
    sliced = slice_at_attention(model(decoder_block), weights(1), *inputs())
    with pytest.raises(ValueError, match=r"int32\[9\].*int32\[4\].*sliced\.at"):
        sliced(weights(1), *inputs(9))
    with pytest.raises(ValueError, match="sliced for arguments"):
        sliced(weights(2), *inputs())


def test_arrays_beyond_two_gigabytes_are_cut_right():
    def fn(x, w, v):
        x = x @ w
        normed = rms_norm(x, jnp.ones(x.shape[1]))
        q = (normed @ v)[:, None, :]
        return attention(q, q, q, scale=1.0), normed, x

    tokens = 2**20 + 7  # the arrays have no large common divisor but this
    x, w, v = (
        jax.ShapeDtypeStruct(shape, np.float32) for shape in ((tokens, 4097), (4097, 4099), (4099, 16))
    )
    (carried,) = slice_at_attention(fn, x, w, v).carried
    assert [array.shape for array in carried] == [(tokens, 4099)]
