"""Small models in plain jnp that the converter's tests cut. T tokens, hidden D, N heads, K KV heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax import attention

T, D, N, K, H, V = 4, 16, 4, 2, 8, 32
Block = Callable[..., Any]


def weights(layers: int, dtype: Any = np.float32) -> dict[str, Any]:
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape, scale=shape[0] ** -0.5)).astype(dtype)

    def layer() -> dict[str, jax.Array]:
        attend = {"q": normal(D, N * H), "k": normal(D, K * H), "v": normal(D, K * H), "o": normal(N * H, D)}
        return attend | {
            "up": normal(D, 2 * D),
            "down": normal(2 * D, D),
            "norm": normal(D),
            "sinks": normal(N),
        }

    return {"embed": normal(V, D), "layers": [layer() for _ in range(layers)]}


def inputs(tokens: int = T) -> tuple[jax.Array, jax.Array]:
    """tokens[T], positions[T]"""
    return jnp.arange(tokens, dtype=np.int32) * 7 % V, jnp.arange(tokens, dtype=np.int32)


def model(block: Block) -> Callable[..., jax.Array]:
    """fn(params, tokens[T], positions[T]) -> logits[T, V]: an embedding, `block` per layer, logits."""

    def fn(params: dict[str, Any], tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        turn = rotation(positions)
        for layer in params["layers"]:
            x = block(layer, x, turn)
        return rms_norm(x, params["layers"][0]["norm"]) @ params["embed"].T

    return fn


def rotation(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    frequencies = np.asarray(0.1 ** np.arange(H // 2), np.float32)
    angles = positions.astype(np.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (part[:, None, :].astype(x.dtype) for part in turn)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(1e-5, x.dtype))
    return x * scale * weight[None, :]


def qkv(layer: dict[str, jax.Array], x: jax.Array, turn: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = ((x @ layer[name]).reshape(x.shape[0], -1, H) for name in "qkv")
    return rotate(q, turn), rotate(k, turn), v


def attend(layer: dict[str, jax.Array], x: jax.Array, turn: Any, **options: Any) -> jax.Array:
    o = attention(*qkv(layer, x, turn), scale=H**-0.5, **options)
    return o.reshape(x.shape[0], -1) @ layer["o"]


def mlp(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.silu(x @ layer["up"]) @ layer["down"]


def decoder_block(layer: dict[str, jax.Array], x: jax.Array, turn: Any) -> jax.Array:
    x = x + attend(layer, rms_norm(x, layer["norm"]), turn)
    return x + mlp(layer, rms_norm(x, layer["norm"]))


def parallel_block(layer: dict[str, jax.Array], x: jax.Array, turn: Any) -> jax.Array:
    normed = rms_norm(x, layer["norm"])
    return x + mlp(layer, normed) + attend(layer, normed, turn)


def two_in_sequence(layer: dict[str, jax.Array], x: jax.Array, turn: Any) -> jax.Array:
    x = x + attend(layer, rms_norm(x, layer["norm"]), turn)
    return x + attend(layer, x, turn, window=2)


def two_in_parallel(layer: dict[str, jax.Array], x: jax.Array, turn: Any) -> jax.Array:
    return x + attend(layer, rms_norm(x, layer["norm"]), turn) + attend(layer, x, turn, window=2)
