"""The attention operator against numpy, its derivative, its batching, and the arithmetic of parts."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from lamina_jax.ops import NO_WINDOW, attention, local_part, merge, sink_part


def reference(q: Any, k: Any, v: Any, scale: float, window: int, softcap: float | None, sinks: Any) -> Any:
    """Token by token and head by head, in float64."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for t in range(tokens):
        for n in range(heads):
            start = max(0, t - window + 1)
            scores = scale * k[start : t + 1, n // group].astype(float) @ q[t, n].astype(float)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            extra = [] if sinks is None else [float(sinks[n])]
            peak = max([*scores, *extra])
            weights = np.exp(scores - peak)
            total = weights.sum() + sum(np.exp(s - peak) for s in extra)
            out[t, n] = weights @ v[start : t + 1, n // group].astype(float) / total
    return out


def tensors(seed: int, tokens: int, num_kv: int, group: int, size: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    shapes = [(tokens, num_kv * group, size), (tokens, num_kv, size), (tokens, num_kv, size)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    tokens=st.sampled_from([1, 2, 9]),
    heads=st.sampled_from([(1, 1), (2, 3), (3, 1)]),
    window=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
)
def test_attention_is_causal_softmax(
    seed: int,
    tokens: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    q, k, v = tensors(seed, tokens, *heads, 8)
    sinks = np.random.default_rng(seed).normal(size=q.shape[1]).astype(np.float32) if with_sinks else None
    jax_sinks = None if sinks is None else jnp.asarray(sinks)
    o = attention(*map(jnp.asarray, (q, k, v)), scale=0.3, window=window, softcap=softcap, sinks=jax_sinks)
    expected = reference(q, k, v, 0.3, window or NO_WINDOW, softcap, sinks)
    np.testing.assert_allclose(o, expected, rtol=2e-5, atol=2e-5)


def test_derivative_agrees_with_differences() -> None:
    q, k, v = map(jnp.asarray, tensors(0, 5, 2, 2, 4))
    sinks = jnp.linspace(-1.0, 1.0, 4, dtype=jnp.float32)

    def loss(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        q, k, v, sinks = map(jnp.asarray, (q, k, v, sinks))
        return jnp.sum(jnp.sin(attention(q, k, v, scale=0.5, window=3, sinks=sinks)))

    check_grads(loss, (q, k, v, sinks), order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)
    jitted = jax.jit(jax.grad(loss))(q, k, v, sinks)
    np.testing.assert_allclose(jitted, jax.grad(loss)(q, k, v, sinks), rtol=1e-5, atol=1e-6)


def test_vmap_is_a_loop_over_sequences() -> None:
    sequences = [tensors(seed, 6, 2, 3, 8) for seed in range(3)]
    q, k, v = (jnp.stack(part) for part in zip(*sequences, strict=True))
    batched = jax.vmap(lambda q, k, v: attention(q, k, v, scale=0.2))(q, k, v)
    for i, sequence in enumerate(sequences):
        np.testing.assert_allclose(
            batched[i], attention(*map(jnp.asarray, sequence), scale=0.2), rtol=1e-5, atol=1e-6
        )
    shared_kv = jax.vmap(lambda q, k, v: attention(q, k, v, scale=0.2), in_axes=(0, None, None))(
        q, k[0], v[0]
    )
    np.testing.assert_allclose(shared_kv[0], batched[0], rtol=1e-5, atol=1e-6)


def test_it_stays_one_operator_when_traced() -> None:
    q, k, v = map(jnp.asarray, tensors(0, 4, 2, 2, 8))
    jaxpr = jax.make_jaxpr(lambda *x: attention(*x, scale=1.0))(q, k, v)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["lamina_attention"]


def test_output_keeps_the_dtype() -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in tensors(0, 4, 2, 2, 8))
    assert attention(q, k, v, scale=1.0).dtype == jnp.bfloat16


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    spread=st.sampled_from([1.0, 80.0]),
)
def test_merging_parts_of_the_keys_is_attention_over_all(seed: int, cuts: list[int], spread: float) -> None:
    """Any partition of the tokens, empty parts and scores far apart included."""
    rng = np.random.default_rng(seed)
    scores = spread * rng.normal(size=(2, 3, 12))
    values = rng.normal(size=(12, 5))
    bounds = [0, *sorted(cuts), 12]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = scores[..., start:stop]
        peak = part.max(axis=-1, initial=-np.inf, keepdims=True)
        weights = np.exp(part - np.where(np.isfinite(peak), peak, 0))
        total = weights.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (np.where(np.isfinite(peak), peak, 0) + np.log(total))[..., 0]
        o = weights @ values[start:stop] / np.maximum(total, 1e-300)
        parts.append((jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32)))
    o, lse = merge(parts)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(o, weights @ values / weights.sum(-1, keepdims=True), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, scores.max(-1) + np.log(weights.sum(-1)), rtol=1e-5, atol=1e-4)


def test_merging_nothing_but_empty_parts_gives_zero() -> None:
    empty = (jnp.zeros((2, 3, 4)), jnp.full((2, 3), -jnp.inf))
    o, lse = merge([empty, empty])
    assert not np.any(np.isnan(o))
    np.testing.assert_array_equal(o, 0)
    assert np.all(np.isneginf(lse))


@pytest.mark.parametrize("queries", [1, 5])
def test_local_part_of_rows_is_attention_of_each(queries: int) -> None:
    rows = [tensors(seed, queries, 2, 2, 8) for seed in range(3)]
    q, k, v = (jnp.stack(part) for part in zip(*rows, strict=True))
    o, lse = local_part(q, k, v, scale=0.4, window=jnp.int32(NO_WINDOW))
    assert lse.shape == (3, queries, 4)
    assert o.dtype == lse.dtype == jnp.float32
    for i, row in enumerate(rows):
        np.testing.assert_allclose(o[i], attention(*map(jnp.asarray, row), scale=0.4), rtol=1e-5, atol=1e-6)


def test_a_sink_is_a_part_without_a_value() -> None:
    o, lse = merge([(jnp.ones((1, 2, 4)), jnp.zeros((1, 2))), sink_part(jnp.zeros(2), jnp.ones((1, 2, 4)))])
    np.testing.assert_allclose(o, 0.5, rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(4, 2, 8), (5, 2, 8), (5, 2, 8)], "tokens"),
        ([(4, 3, 8), (4, 2, 8), (4, 2, 8)], "multiple of 2"),
        ([(4, 2, 8), (4, 2, 8), (4, 1, 8)], "one shape"),
        ([(4, 2, 8), (4, 2, 4), (4, 2, 4)], "head_dim"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        attention.__wrapped__(*(jnp.zeros(shape) for shape in shapes), scale=1.0)
