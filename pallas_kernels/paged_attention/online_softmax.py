"""Attention over keys that come block by block: running maximum, sum and output of every row.

Plain jnp on values, for loops that XLA compiles. The Pallas kernels, whose compilers ask for shapes of their
own, share only `LOWEST`. Knows nothing of pages.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

# Below every score, yet finite: the first exp(lowest - maximum) is 0 and never exp(-inf + inf).
LOWEST = float(jnp.finfo(jnp.float32).min)


class State(NamedTuple):
    """Of R rows for each of K KV heads: f32 maximum score, sum of exp(score - maximum), sum of that x v."""

    maximum: Float32[Array, "K R 1"]
    total: Float32[Array, "K R 1"]
    weighted: Float32[Array, "K R H"]


def start(K: int, R: int, H: int) -> State:
    """Nothing seen yet."""
    return State(
        maximum=jnp.full((K, R, 1), LOWEST, jnp.float32),
        total=jnp.zeros((K, R, 1), jnp.float32),
        weighted=jnp.zeros((K, R, H), jnp.float32),
    )


def attend(
    state: State,
    q: Float[Array, "K R H"],
    k: Float[Array, "K S H"],
    v: Float[Array, "K S H"],
    visible: Bool[Array, "#K R S"],
    *,
    scale: Float32[Array, "K 1 S"] | float,
    softcap: float | None,
    v_scale: Float32[Array, "K 1 S"] | None = None,
) -> State:
    """The state after S more keys. v and its scale must be finite everywhere; k and `scale` may be NaN
    where nothing sees them.

    Products are taken in the dtype of k and v (q and the probabilities are rounded to it) and summed
    in float32. The scale of a quantised k is a factor of `scale`; that of v goes into the probabilities.
    """
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    scores = scale * jnp.einsum(
        "KRH,KSH->KRS", q.astype(k.dtype), k, precision=precision, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, -jnp.inf)

    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True))
    shrink = jnp.exp(state.maximum - maximum)
    weights = jnp.exp(scores - maximum)
    of_v = weights if v_scale is None else weights * v_scale
    seen = jnp.einsum(
        "KRS,KSH->KRH", of_v.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return State(
        maximum=maximum,
        total=state.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        weighted=state.weighted * shrink + seen,
    )


def finish(state: State) -> tuple[Float32[Array, "K R H"], Float32[Array, "K R 1"]]:
    """(o, lse); o = 0 and lse = -inf for the rows that saw nothing."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    return state.weighted / total, jnp.where(seen, state.maximum + jnp.log(total), -jnp.inf)
