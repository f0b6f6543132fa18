"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM): Llama whose query, key and value projections have biases."""

from __future__ import annotations

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.llama import Attention, Llama


class QKVBiasAttention(Attention):
    """Attention with biases on q, k and v, and none on o."""

    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        return True, False


class Qwen2(Llama):
    """Llama over `QKVBiasAttention`."""

    attention_type = QKVBiasAttention
