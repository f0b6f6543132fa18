"""Random checkpoints of real shapes, for benchmarks: speed does not depend on what weights say."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lamina_jax.models import ModelConfig, Storage, build
from lamina_jax.weights.export import save_checkpoint

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


_BLOCK = 1_000_003
"""Normal numbers that are drawn; a tensor repeats them. Prime, so that the rows of a matrix differ."""


def random_checkpoint(config: ModelConfig, folder: Path) -> Path:
    """Write random weights of `config`'s shape to `folder`."""
    model = build(config, Storage(jnp.dtype(config.dtype)))
    normal = np.random.default_rng(0).normal(scale=0.02, size=_BLOCK).astype(jnp.dtype(config.dtype))
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        ones = np.full(1, parameter.init == "ones", normal.dtype)
        parameter.set_value(np.resize(normal if parameter.init == "normal" else ones, parameter.shape))
    save_checkpoint(model, config, folder)
    return folder
