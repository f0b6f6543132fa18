"""The decoder of all families: plain flax.nnx modules over shared layers.

`build(config, storage)` gives a model whose parameters are abstract; `initialise` or the loader of
`lamina_jax.weights` fills them. A model is called as `model(tokens[T], positions[T], logits_at[B]) ->
logits f32[B, V]`; `as_function(model)` gives the same as a function of its parameters, which is what
the converter slices. Batches of whole sequences (training) are a `jax.vmap` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lamina_jax.models.config import ModelConfig, RopeConfig
from lamina_jax.models.decoder import Decoder
from lamina_jax.models.layers import Storage

__all__ = ["ModelConfig", "RopeConfig", "Storage", "as_function", "build", "initialise"]


def build(config: ModelConfig, storage: Storage) -> Decoder:
    """The model of `config`, its parameters abstract."""
    return Decoder(config, storage)


def as_function(model: nnx.Module) -> tuple[Callable[..., jax.Array], Any]:
    """(fn, params) with `fn(params, tokens, positions, logits_at)` equal to the model's call."""
    graph, params = nnx.split(model, nnx.Param)

    def fn(params: Any, tokens: jax.Array, positions: jax.Array, logits_at: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens, positions, logits_at)

    return fn, params


def initialise(model: nnx.Module, seed: int, std: float = 0.02) -> None:
    """Fill an abstract model with random weights, as each parameter's `init` says."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)
    for _, parameter in nnx.to_flat_state(state):
        shape, dtype = parameter.shape, parameter.dtype
        if parameter.init == "normal":
            value = rng.normal(scale=std, size=shape).astype(np.float32)
        else:
            value = np.full(shape, 1.0 if parameter.init == "ones" else 0.0, np.float32)
        parameter.set_value(jnp.asarray(value, dtype))
    nnx.update(model, state)
