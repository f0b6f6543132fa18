"""A bfloat16 model computes in float32 what must be: sums, norms, softmax, lse, rotations, logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from lamina_jax.models import ModelConfig, Storage, as_function, build
from lamina_jax.models.config import Family
from lamina_jax.ops import local_part, merge
from pallas_kernels import paged_attention

BF16 = jnp.dtype(jnp.bfloat16)
WIDE = {"dot_general", "exp", "log", "rsqrt", "cos", "sin", "logistic", "reduce_sum", "reduce_max", "div"}
"""Operators whose results are never rounded to 16 bits."""


def operators(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from operators(inner)


def assert_wide(closed: jax.extend.core.ClosedJaxpr, least: int) -> None:
    """At least so many of the operators in WIDE occur, and none of their results is bfloat16."""
    found = [equation for equation in operators(closed.jaxpr) if equation.primitive.name in WIDE]
    assert len(found) >= least
    assert "bfloat16" not in {out.aval.dtype.name for equation in found for out in equation.outvars}


@pytest.mark.parametrize("family", get_args(Family))
def test_a_bfloat16_model_sums_in_float32(family: Family) -> None:
    config = ModelConfig(
        family=family, vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position=64,
    )  # fmt: skip
    fn, params = as_function(build(config, Storage(BF16)))
    tokens, at = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (6, 2))
    closed = jax.make_jaxpr(fn)(params, tokens, tokens, at)
    assert closed.out_avals[0].dtype == jnp.float32
    assert_wide(closed, 20)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kv", ["bfloat16", "float32"])
def test_parts_are_float32(queries: int, kv: str) -> None:
    def struct(*dims: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

    q, k = struct(2, queries, 4, 8), struct(2, queries, 2, 8)
    table, rows = struct(2, 3, dtype="int32"), struct(2, dtype="int32")

    def step(q, k, v, pages, tables, lens, places, positions):  # type: ignore[no-untyped-def]
        window = jnp.int32(7)
        local = local_part(q, k, v, scale=1.0, window=window)
        cached = paged_attention(q, pages, tables, lens, places, positions, window, scale=1.0)
        return local, cached, merge([local, cached])

    pages, positions = struct(6, 2, 2, 4, 8, dtype=kv), struct(2, queries, dtype="int32")
    closed = jax.make_jaxpr(step)(q, k, k, pages, table, rows, table, positions)
    assert {aval.dtype.name for aval in closed.out_avals} == {"float32"}
    assert_wide(closed, 8)
