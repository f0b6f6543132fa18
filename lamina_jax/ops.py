"""The attention operator and the arithmetic of its parts.

`attention` is what a model calls. It is a JAX primitive, so that the converter can find it; under a
plain `jax.jit` it means causal attention over the tokens of one sequence. A step of a serving engine
reads it as a *local part* (the new tokens among themselves) and *cached parts* (the new tokens
against KV pages), each a pair `(o, lse)`, which `merge` puts together.

This module knows nothing of caches, pages, requests, meshes or layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

NO_WINDOW = 2**30
"""The window that bounds nothing: longer than any context."""

Part = tuple[Float[Array, "*rows N H"], Float[Array, "*rows N"]]
"""A partial attention output: the normalised output `o` and `lse = log sum exp(scores)` in float32."""


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention over the T tokens of one sequence.

    Query head n reads KV head n // G. Scores are `scale * q.k`, bounded to `softcap * tanh(s /
    softcap)` where a softcap is given; token t sees tokens (t - window, t]. `sinks` adds one score per
    head to the softmax denominator that has no value.

    Returns:
        The output in q's dtype; accumulation is in float32.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_shapes(q, k, v, sinks)
    window = jnp.asarray(NO_WINDOW if window is None else window, jnp.int32)
    operands = (q, k, v, window) if sinks is None else (q, k, v, window, sinks)
    (out,) = attention_p.bind(
        *operands,
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        has_sinks=sinks is not None,
    )
    return out


def local_part(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
) -> Part:
    """The new tokens among themselves, causal within each row; (o f32[B, Q, N, H], lse f32[B, Q, N]).

    For one token per row it is in closed form: `o = v`, `lse = scale q.k`.
    """
    rows, queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(rows, queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    f32 = jnp.float32
    if queries == 1:
        scores = jnp.einsum("bqkgh,bqkh->bqkg", q, k, preferred_element_type=f32) * f32(scale)
        lse = _soft_capped(scores, softcap).reshape(rows, queries, num_heads)
        o = jnp.broadcast_to(v.astype(f32)[:, :, :, None], q.shape)
        return o.reshape(rows, queries, num_heads, head_dim), lse

    scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=f32) * f32(scale)
    scores = _soft_capped(scores, softcap)
    age = jnp.arange(queries, dtype=jnp.int32)[:, None] - jnp.arange(queries, dtype=jnp.int32)[None, :]
    seen = (age >= 0) & (age < window)
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, f32(0)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    o = jnp.einsum("bkgqs,bskh->bqkgh", weights.astype(v.dtype), v, preferred_element_type=f32)
    o = o / jnp.maximum(jnp.moveaxis(total, 3, 1), f32(np.finfo(np.float32).tiny))
    lse = jnp.moveaxis((peak + jnp.log(total))[..., 0], 3, 1)
    return o.reshape(rows, queries, num_heads, head_dim), lse.reshape(rows, queries, num_heads)


def sink_part(sinks: Float[Array, " N"], o: Float[Array, "*rows N H"]) -> Part:
    """Attention sinks as a part beside `o`: an output of nothing with the weight of the sink."""
    return jnp.zeros(o.shape, jnp.float32), jnp.broadcast_to(sinks.astype(jnp.float32), o.shape[:-1])


def merge(parts: Sequence[Part]) -> Part:
    """Put parts over disjoint token sets together by their log-sum-exp (paper 4.2.2).

    With S_i = exp(lse_i): `o = sum S_i o_i / sum S_i`, `lse = log sum S_i`, in float32. A part that
    saw no token has lse = -inf and o finite, and weighs nothing; if no part saw one, o = 0.

    Returns:
        (o f32[..., N, H], lse f32[..., N]).
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    outputs = [o.astype(jnp.float32) for o, _ in parts]
    if len(parts) == 1:
        return outputs[0], parts[0][1]
    lses = [lse for _, lse in parts]
    peak = lses[0]
    for lse in lses[1:]:
        peak = jnp.maximum(peak, lse)
    peak = jnp.where(jnp.isfinite(peak), peak, jnp.float32(0))
    weights = [jnp.exp(lse - peak) for lse in lses]
    total = sum(weights[1:], weights[0])
    scale = jnp.float32(1) / jnp.maximum(total, jnp.float32(np.finfo(np.float32).tiny))
    o = outputs[0] * (weights[0] * scale)[..., None]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        o = o + output * (weight * scale)[..., None]
    return o, peak + jnp.log(total)


def _soft_capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    if softcap is None:
        return scores
    cap = jnp.float32(softcap)
    return cap * jnp.tanh(scores / cap)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        raise ValueError(
            f"attention takes q[T, N, H] and k, v[T, K, H] of one shape; got q{list(q.shape)}, "
            f"k{list(k.shape)}, v{list(v.shape)}"
        )
    tokens, num_heads, head_dim = q.shape
    if k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(
            f"q{list(q.shape)} and k{list(k.shape)} differ in tokens (axis 0) or head_dim (axis 2)"
        )
    if num_heads % k.shape[1]:
        raise ValueError(f"{num_heads} query heads are not a multiple of {k.shape[1]} KV heads")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must hold one score per query head, [{num_heads}]; got {list(sinks.shape)}")


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: jax.Array,
    *sinks: jax.Array,
    scale: float,
    softcap: float | None,
    has_sinks: bool,
) -> tuple[jax.Array]:
    """The plain reading: one row whose tokens are all new, so that the local part is everything."""
    part = local_part(q[None], k[None], v[None], scale=scale, window=window, softcap=softcap)
    if has_sinks:
        part = merge([part, sink_part(sinks[0], part[0])])
    return (part[0][0].astype(q.dtype),)


def _abstract(q, *_, **__):  # type: ignore[no-untyped-def]
    return [jax.core.ShapedArray(q.shape, q.dtype)]


def _jvp(primals, tangents, **params):  # type: ignore[no-untyped-def]
    q, k, v, window, *sinks = primals
    diffs = [ad.instantiate_zeros(t) for i, t in enumerate(tangents) if i != 3]

    def of_floats(q, k, v, *sinks):  # type: ignore[no-untyped-def]
        return _plain(q, k, v, window, *sinks, **params)

    return jax.jvp(of_floats, (q, k, v, *sinks), tuple(diffs))


def _batch(operands, axes, **params):  # type: ignore[no-untyped-def]
    out = jax.vmap(lambda *xs: _plain(*xs, **params), in_axes=tuple(axes))(*operands)
    return out, (0,)


attention_p = jex_core.Primitive("lamina_attention")
"""Operands q, k, v, window (int32 scalar) and, with `has_sinks`, sinks; params scale, softcap, has_sinks."""
attention_p.multiple_results = True
attention_p.def_impl(jax.jit(_plain, static_argnames=("scale", "softcap", "has_sinks")))
attention_p.def_abstract_eval(_abstract)
mlir.register_lowering(attention_p, mlir.lower_fun(_plain, multiple_results=True))
ad.primitive_jvps[attention_p] = _jvp
batching.primitive_batchers[attention_p] = _batch
