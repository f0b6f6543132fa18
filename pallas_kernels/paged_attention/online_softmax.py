"""Attention over keys that come block by block: running maximum, sum and output of every row.

Plain jnp on values, for loops that XLA or Triton compiles. The TPU's kernel, whose compiler asks for shapes
of its own, shares only `LOWEST`. Knows nothing of pages.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

# Below every score, yet finite: the first exp(lowest - maximum) is 0 and never exp(-inf + inf).
LOWEST = float(jnp.finfo(jnp.float32).min)


class State(NamedTuple):
    """Of R rows, of one KV head or for each of K: f32 maximum score, sum of exp(score - maximum), sum of that
    x v."""

    maximum: Float32[Array, "*K R 1"]
    total: Float32[Array, "*K R 1"]
    weighted: Float32[Array, "*K R H"]


def start(*shape: int) -> State:
    """Nothing seen yet; `shape` is that of q."""
    *rows, _ = shape
    return State(
        maximum=jnp.full((*rows, 1), LOWEST, jnp.float32),
        total=jnp.zeros((*rows, 1), jnp.float32),
        weighted=jnp.zeros(shape, jnp.float32),
    )


def score(
    q: Float[Array, "*K R H"],
    k: Float[Array, "*K S H"],
    visible: Bool[Array, "*#K R S"],
    *,
    scale: Float32[Array, "*K 1 S"] | float,
    softcap: float | None,
) -> Float32[Array, "*K R S"]:
    """The score of each key for each row, -inf where a row does not see it: there k and `scale` may be NaN.

    Products are taken in the dtype of k, to which q is rounded, and summed in float32. The scale of a
    quantised k is a factor of `scale`.
    """
    scores = scale * _product("...RH,...SH->...RS", q.astype(k.dtype), k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible, scores, -jnp.inf)


def attend(
    state: State,
    scores: Float32[Array, "*K R S"],
    v: Float[Array, "*K S H"],
    v_scale: Float32[Array, "*K 1 S"] | None = None,
) -> State:
    """The state after S more keys. v and its scale must be finite everywhere.

    Products are taken in the dtype of v, to which the probabilities are rounded once a quantised v has been
    given its scale in them.
    """
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True))
    shrink = jnp.exp(state.maximum - maximum)
    weights = jnp.exp(scores - maximum)
    of_v = weights if v_scale is None else weights * v_scale
    return State(
        maximum=maximum,
        total=state.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        weighted=state.weighted * shrink + _product("...RS,...SH->...RH", of_v.astype(v.dtype), v),
    )


def finish(state: State) -> tuple[Float32[Array, "*K R H"], Float32[Array, "*K R 1"]]:
    """(o, lse); o = 0 and lse = -inf for the rows that saw nothing."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    return state.weighted / total, jnp.where(seen, state.maximum + jnp.log(total), -jnp.inf)


def _product(dimensions: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.einsum(dimensions, a, b, precision=precision, preferred_element_type=jnp.float32)
