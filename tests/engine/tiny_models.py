"""Tiny random checkpoints for tests of whole engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lamina_jax.models import ModelConfig, Storage, build, initialise
from lamina_jax.weights.export import save_checkpoint

TINY = ModelConfig(
    family="qwen3",
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position=256,
    dtype="float32",
)
"""K = 4, so that memory meshes of 1, 2 and 4 devices divide it; heads x head_dim is not the hidden size."""


def save_random(folder: Path, config: ModelConfig = TINY, seed: int = 0, std: float = 0.4) -> Path:
    """A checkpoint with weights so large that its logits are no near-ties."""
    model = build(config, Storage(jnp.dtype(config.dtype)))
    initialise(model, seed, std=std)
    save_checkpoint(model, config, folder)
    return folder


SMALL: dict[str, Any] = {"page_size": 8, "max_num_seqs": 4, "max_model_len": 96, "max_prefill_tokens": 20}
"""Settings with few programs to compile, and chunks that end within a page."""
