"""Random checkpoints of real shapes, for benchmarks: speed does not depend on what weights say."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from lamina_jax.models import ModelConfig, RopeConfig, Storage, build, initialise
from lamina_jax.weights.export import save_checkpoint

QWEN3_0_6B = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position=40960,
    rope=RopeConfig(theta=1e6),
    tie_embeddings=True,
    dtype="bfloat16",
)
"""596 M parameters, 1.2 GB."""

COMPUTE_BOUND = ModelConfig(
    family="qwen3",
    vocab_size=512,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position=8192,
    tie_embeddings=True,
    dtype="float32",
)
"""Three like layers and hardly a vocabulary: nearly all of a step is in its layers. G = 4. In float32, whose
products one core computes at nearly its full speed from some 256 rows on."""


def random_checkpoint(config: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """Write random weights of `config`'s shape to `folder`."""
    model = build(config, Storage(jnp.dtype(config.dtype)))
    initialise(model, seed)
    save_checkpoint(model, config, folder)
    return folder
