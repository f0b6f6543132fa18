"""The shapes of models that are named rather than read: for benchmarks, and for compiling ahead of time.

As their config.json gives them. No jax here.
"""

from __future__ import annotations

from dataclasses import replace

from lamina_jax.models.config import ModelConfig, RopeConfig

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

LLAMA3_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=5e5, scaling="llama3", factor=8.0),
)

LLAMA3_70B = replace(LLAMA3_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)

SHAPES = {"qwen3-0.6b": QWEN3_0_6B, "llama3-8b": LLAMA3_8B, "llama3-70b": LLAMA3_70B}

HUB_IDS = {
    "Qwen/Qwen3-0.6B": QWEN3_0_6B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA3_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA3_70B,
}
"""The models on Hugging Face that have these shapes."""
