"""The decoder of every family: Llama 1, 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3.

They differ in attention alone: Mistral and Qwen may have windows, Qwen2 has biases on q, k and v, and Qwen3
normalises the heads of q and k.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.layers import (
    Embedding,
    GatedMLP,
    Linear,
    RMSNorm,
    Rotation,
    Storage,
    add,
    rotate,
    rotation,
)
from lamina_jax.ops import attention


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, storage: Storage) -> None:
        name = f"model.layers.{layer}.self_attn"
        self.window = config.windows[layer] if config.windows else None
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query, kv = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        qkv_bias = config.attention_bias or config.family == "qwen2"
        o_bias = config.attention_bias and config.family != "qwen2"
        self.q = Linear((hidden, query), ("embed", "heads"), f"{name}.q_proj", storage, qkv_bias)
        self.k = Linear((hidden, kv), ("embed", "kv_heads"), f"{name}.k_proj", storage, qkv_bias)
        self.v = Linear((hidden, kv), ("embed", "kv_heads"), f"{name}.v_proj", storage, qkv_bias)
        self.o = Linear((query, hidden), ("heads", "embed"), f"{name}.o_proj", storage, o_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, "head_dim", f"{name}.{which}_norm", storage, config.rms_norm_eps)
            if config.family == "qwen3"
            else None
            for which in "qk"
        )

    def __call__(self, x: Float[Array, "T D"], turn: Rotation) -> Float32[Array, "T D"]:
        q = rotate(self.heads(self.q(x), self.q_norm), turn)
        k = rotate(self.heads(self.k(x), self.k_norm), turn)
        q, k, v = (part.astype(x.dtype) for part in (q, k, self.heads(self.v(x))))
        o = attention(q, k, v, scale=self.head_dim**-0.5, window=self.window)
        return self.o(o.reshape(x.shape[0], -1))

    def heads(self, x: Float32[Array, "T NH"], norm: RMSNorm | None = None) -> Float32[Array, "T N H"]:
        heads = x.reshape(x.shape[0], -1, self.head_dim)
        return heads if norm is None else norm(heads)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, storage: Storage) -> None:
        name, norm = f"model.layers.{layer}", (config.hidden_size, "embed")
        self.attention_norm = RMSNorm(*norm, f"{name}.input_layernorm", storage, config.rms_norm_eps)
        self.attention = Attention(config, layer, storage)
        self.mlp_norm = RMSNorm(*norm, f"{name}.post_attention_layernorm", storage, config.rms_norm_eps)
        self.mlp = GatedMLP(config, f"{name}.mlp", storage)

    def __call__(self, x: Float[Array, "T D"], turn: Rotation) -> Float[Array, "T D"]:
        x = add(x, self.attention(self.attention_norm(x), turn))
        return add(x, self.mlp(self.mlp_norm(x)))


class Decoder(nnx.Module):
    """tokens[T] at positions[T] to the logits of the tokens `logits_at`."""

    def __init__(self, config: ModelConfig, storage: Storage) -> None:
        self.config = config
        self.embedding = Embedding(config, "model.embed_tokens", storage)
        self.blocks = nnx.List(Block(config, layer, storage) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, "embed", "model.norm", storage, config.rms_norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Linear((config.hidden_size, config.vocab_size), ("embed", "vocab"), "lm_head", storage)
        )

    def __call__(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"], logits_at: Int[Array, " B"]
    ) -> Float32[Array, "B V"]:
        x = self.embedding(tokens)
        turn = rotation(positions, self.config.rope, self.config.head_dim)
        for block in self.blocks:
            x = block(x, turn)
        x = self.norm(take_rows(x, logits_at))
        if self.head is None:
            return self.embedding.logits(x)
        return self.head(x)


def take_rows(x: Float[Array, "T D"], rows: Int[Array, " B"]) -> Float[Array, "B D"]:
    """x[rows], in float32 on the way: XLA on a CPU gathers 16-bit floats badly."""
    return x.astype(jnp.float32)[rows].astype(x.dtype)
