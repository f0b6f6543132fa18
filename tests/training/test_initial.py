"""The starting weights: layer 0 looks back by known distances, layer 1 finds repeated pairs of tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax.models import ModelConfig, RopeConfig, decoder
from lamina_jax.training.initial import initial_model

LENGTH = 96
REPEATED_AT = 60


@pytest.fixture(params=[0, 1500], ids=["first", "later"])
def scores(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> np.ndarray:
    """Causal attention scores [layer, head, query, key] over random tokens, some of which come twice."""
    config = replace(
        tiny_config,
        num_layers=2,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rope=RopeConfig(theta=1e5),
    )
    plain, seen = decoder.attention, []

    def spy(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: None) -> jax.Array:
        seen.append(jnp.einsum("qngh,snh->ngqs", q.reshape(LENGTH, 2, 2, 64), k).reshape(4, LENGTH, LENGTH))
        return plain(q, k, v, scale=scale, window=window)

    monkeypatch.setattr(decoder, "attention", spy)
    tokens = np.random.default_rng(0).permutation(config.vocab_size)[:LENGTH].astype(np.int32)
    tokens[REPEATED_AT:] = tokens[: LENGTH - REPEATED_AT]
    at = jnp.arange(LENGTH, dtype=jnp.int32)
    initial_model(config, seed=0)(jnp.asarray(tokens), at + jnp.int32(request.param), at)
    return np.where(np.tri(LENGTH) > 0, np.stack(seen), -np.inf)


def test_layer_0_attends_a_fixed_number_of_tokens_back(scores: np.ndarray) -> None:
    for head in range(4):
        distances = np.arange(LENGTH) - scores[0, head].argmax(axis=1)
        assert np.mean(distances[8:] == head + 1) > 0.9


def test_layer_1_attends_to_what_followed_the_same_tokens(scores: np.ndarray) -> None:
    """Query i's tokens i - 1 and i - 2 stood 60 places earlier: heads 0 and 1 find the place after."""
    queries = np.arange(REPEATED_AT + 4, LENGTH)
    for head in (0, 1):
        found = scores[1, head, queries].argmax(axis=1)
        assert np.mean(found == queries - REPEATED_AT + 1) > 0.8


def test_heads_narrower_than_the_hidden_state_are_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"got 2 \* 8 and 32"):
        initial_model(replace(tiny_config, head_dim=8), seed=0)
