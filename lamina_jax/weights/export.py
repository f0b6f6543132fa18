"""Writes a model as a Hugging Face folder: config.json and model.safetensors.

For models that are made here (trained, or random for tests and benchmarks). The tokenizer's files are
the caller's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.hf_config import FAMILIES


def save_checkpoint(model: nnx.Module, config: ModelConfig, folder: Path) -> None:
    """Write `model`, its weights in `config.dtype`, so that `lamina_jax.weights` reads it back.

    The weights are written beside the final file and moved, so that a reader never sees half.

    Raises:
        ValueError: a rope scaling that this does not write, or windows of several lengths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n", encoding="utf-8")
    unfinished = folder / "model.safetensors.partial"
    save_file(checkpoint_tensors(model, config.dtype), unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # the library makes it readable to its owner alone
    unfinished.replace(folder / "model.safetensors")


def checkpoint_tensors(model: nnx.Module, dtype: str) -> dict[str, np.ndarray]:
    """Every parameter under its checkpoint name, the right way round."""
    tensors = {}
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(parameter.get_value()).astype(jnp.dtype(dtype))
        turned = value.T if parameter.get_metadata("transpose") else value
        tensors[parameter.get_metadata("name")] = np.ascontiguousarray(turned)
    return tensors


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """`config` in the keys of Hugging Face's config.json."""
    if config.rope.scaling != "default":
        raise ValueError(f"a checkpoint with {config.rope.scaling!r} rope scaling is not written")
    (architecture,) = (name for name, family in FAMILIES.items() if family == config.family)
    values = {
        "architectures": [architecture],
        "model_type": config.family,
        "torch_dtype": config.dtype,
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
        "attention_bias": config.attention_bias or config.family == "qwen2",
        "mlp_bias": config.mlp_bias,
        **_windows(config),
    }
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    return values | {key: value for key, value in ids.items() if value is not None}


def _windows(config: ModelConfig) -> dict[str, Any]:
    lengths = {window for window in config.windows if window is not None}
    if len(lengths) > 1:
        raise ValueError(f"windows of several lengths, {sorted(lengths)}, are not written")
    window = lengths.pop() if lengths else None
    if config.family == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {}
    types = ["full_attention" if layer is None else "sliding_attention" for layer in config.windows]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
