"""Qwen3 (Qwen3ForCausalLM): Llama with normalised queries and keys, and heads of a size of their own."""

from __future__ import annotations

from jaxtyping import Array, Float32

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.layers import RMSNorm, Storage
from lamina_jax.models.llama import Attention, Llama


class QKNormAttention(Attention):
    """Attention whose query and key heads pass an RMSNorm before they are rotated."""

    def __init__(self, config: ModelConfig, layer: int, storage: Storage) -> None:
        super().__init__(config, layer, storage)
        name = f"model.layers.{layer}.self_attn"
        self.q_norm = RMSNorm(self.head_dim, "head_dim", f"{name}.q_norm", storage, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, "head_dim", f"{name}.k_norm", storage, config.rms_norm_eps)

    def head_norm(self, which: str, heads: Float32[Array, "T N H"]) -> Float32[Array, "T N H"]:
        return self.q_norm(heads) if which == "q" else self.k_norm(heads)


class Qwen3(Llama):
    """Llama over `QKNormAttention`."""

    attention_type = QKNormAttention
