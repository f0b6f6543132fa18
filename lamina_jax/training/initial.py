"""Where training starts: random weights in which one induction circuit already stands.

Recall needs three things at once: tokens that know what stood before them, a layer that finds the place
where the same tokens stood before, and a way to copy what it finds. Gradient descent sees little of any
one until it has the others, so small models linger for hours before they recall. They are given here:

- layer 0, head n attends n + 1 tokens back and writes that token into a subspace of its own;
- layer 1, KV head g attends to where the two tokens g + 2 and g + 3 places back are those that now are
  g + 1 and g + 2 places back, and copies what stands there.

All else is random, nothing here knows a word of the tasks, and training is free to change all of it.
Arrays here are row-vector matrices, [in, out].
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lamina_jax.models import ModelConfig, Storage, build, initialise
from lamina_jax.models.decoder import Attention, Decoder
from lamina_jax.models.layers import rope_frequencies

EMBEDDING_STD = 0.04
# Every embedding has this one component, from which layer 0 makes its preferred distances.
CONSTANT = 8 * EMBEDDING_STD
# Layer 0 writes twice as loud as the embedding; other layers begin quietly.
LOOKBACK_STD = 2 * EMBEDDING_STD
QUIET = 0.03
LOOKBACK_SHARPNESS = 6.0
MATCH_GAIN = 2.5
COPY_GAIN = 0.8


def initial_model(config: ModelConfig, seed: int) -> Decoder:
    """A model to train: float32, matrices as [in, out].

    Raises:
        ValueError: the heads together are not as wide as the hidden state.
    """
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"num_heads * head_dim must equal hidden_size, got {config.num_heads} * {config.head_dim} and "
            f"{config.hidden_size}"
        )
    model = build(config, Storage(jnp.dtype("float32"), "in_out"))
    initialise(model, seed, EMBEDDING_STD)
    embedding = model.embedding.weight
    embedding.set_value(embedding[...].at[:, 0].set(CONSTANT))
    for block in model.blocks:
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight.set_value(weight[...] * QUIET)
    rng = np.random.default_rng([seed, 1])
    subspaces = _look_back(model.blocks[0].attention, config, rng)
    if config.num_layers > 1:
        _find_and_copy(model.blocks[1].attention, config, subspaces, rng)
    return model


def _look_back(layer: Attention, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """Sets layer 0; returns the orthonormal subspace [N, H, D] that each head writes to.

    A constant k = (a, 0) and q = (a cos dw, -a sin dw) in each rotary pair of frequency w score
    a^2 sum_w cos((i - j - d) w): the most where the key is d tokens back. The fast quarter is used.
    """
    hidden, heads, size = config.hidden_size, config.num_heads, config.head_dim
    constant = CONSTANT / np.sqrt((CONSTANT**2 + EMBEDDING_STD**2 * (hidden - 1)) / hidden)
    amplitude = np.sqrt(LOOKBACK_SHARPNESS * np.sqrt(size)) / constant
    frequencies = rope_frequencies(config.rope, size)
    fast = np.arange(size // 2) < size // 8

    def row(distances: np.ndarray) -> np.ndarray:
        angles = distances[:, None] * frequencies[None, :]
        return amplitude * np.concatenate([np.cos(angles) * fast, -np.sin(angles) * fast], axis=1).reshape(-1)

    for weight, distances in (
        (layer.q.weight, 1 + np.arange(heads)),
        (layer.k.weight, np.zeros(config.num_kv_heads)),
    ):
        # The random rest is turned down, lest it shift the distances.
        _set(weight, np.concatenate([row(distances)[None], QUIET * np.asarray(weight[...])[1:]]))
    _set(layer.v.weight, np.tile(_reader(rng, config), config.num_kv_heads))
    subspaces = np.linalg.qr(rng.normal(size=(hidden, hidden)))[0]
    _set(layer.o.weight, LOOKBACK_STD * subspaces)
    return subspaces.reshape(heads, size, hidden)


def _find_and_copy(
    layer: Attention, config: ModelConfig, subspaces: np.ndarray, rng: np.random.Generator
) -> None:
    """Sets layer 1: two tokens are compared in the slow half of the rotary pairs, which see no distance."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    slow = np.arange(size // 4, size // 2)
    places = [np.concatenate([slow[i::2], slow[i::2] + size // 2]) for i in range(2)]
    views = [MATCH_GAIN * rng.normal(scale=size**-0.5, size=(size, len(place))) for place in places]

    def compare(distance: int) -> np.ndarray:
        weight = np.zeros((config.hidden_size, size))
        for i, (place, view) in enumerate(zip(places, views, strict=True)):
            weight[:, place] = subspaces[min(distance + i, heads) - 1].T @ view
        return weight

    groups = range(kv_heads)
    _set(layer.k.weight, np.concatenate([compare(g + 2) for g in groups], axis=1))
    per_group = heads // kv_heads
    _set(layer.q.weight, np.concatenate([compare(g + 1) for g in groups for _ in range(per_group)], axis=1))
    readers = [_reader(rng, config) for _ in groups]
    _set(layer.v.weight, np.concatenate(readers, axis=1))
    _set(layer.o.weight, np.concatenate([COPY_GAIN * r.T for r in readers for _ in range(per_group)]))


def _reader(rng: np.random.Generator, config: ModelConfig) -> np.ndarray:
    """A random view [D, H] of a normalised hidden state, blind to the constant component."""
    reader = rng.normal(scale=config.hidden_size**-0.5, size=(config.hidden_size, config.head_dim))
    reader[0] = 0.0
    return reader


def _set(parameter: nnx.Param, value: np.ndarray) -> None:
    assert parameter.shape == value.shape
    parameter.set_value(jnp.asarray(value, parameter.dtype))
