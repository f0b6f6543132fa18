"""A decoder's shape, read from a Hugging Face `config.json`. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `scaling` is Hugging Face's rope type; the rest are its parameters.

    Llama 3.1's "llama3": `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position`.
    "linear": positions are divided by `factor`. "default": none of them.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder: L layers, D hidden, F feed-forward, N query heads, K KV heads, H head
    dimension, V vocabulary.

    Attributes:
        windows: how many tokens each layer's tokens see, themselves included; None: all. Empty: all
            layers see all tokens.
        attention_bias: q, k, v and o have biases, in the families that leave the choice.
        dtype: of the checkpoint.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
