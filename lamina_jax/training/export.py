"""Writes a trained model as a Hugging Face folder. This module knows nothing of how it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import save
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig
from lamina_jax.training.tokenizer import BOS, EOS, PAD, save_tokenizer


def export(model: nnx.Module, config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files.

    The weights are written to a file beside the final one and moved, so that a reader never sees half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(token)
        for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    _write_json(folder / "config.json", llama_config(config) | ids)
    _write_json(folder / "generation_config.json", {"do_sample": False} | ids)
    save_tokenizer(tokenizer, folder, config.max_position)
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(checkpoint_tensors(model), metadata={"format": "pt"}))
    partial.replace(folder / "model.safetensors")


def checkpoint_tensors(model: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter under its checkpoint name, in bfloat16, matrices as [out, in]."""
    tensors = {}
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = parameter[...].astype(jnp.bfloat16)
        tensors[parameter.get_metadata("name")] = value.T if parameter.get_metadata("transpose") else value
    return tensors


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """`config` in the keys of Hugging Face's LlamaForCausalLM.

    Raises:
        ValueError: the model is something else.
    """
    if config.family != "llama" or config.rope.scaling != "default":
        raise ValueError(
            f"only a Llama with plain rotary positions is exported, not {config.family} with "
            f"{config.rope.scaling!r} scaling"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
