"""Mistral (MistralForCausalLM): Llama without biases, and in its first version with a sliding window."""

from __future__ import annotations

from lamina_jax.models.llama import Llama


class Mistral(Llama):
    """Llama whose layers all have the same window, or none: see `ModelConfig.windows`."""
