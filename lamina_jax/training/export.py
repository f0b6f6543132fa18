"""Writes a trained model and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig
from lamina_jax.training.tokenizer import BOS, EOS, save_tokenizer
from lamina_jax.weights.export import save_checkpoint


def export(model: nnx.Module, config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files."""
    vocabulary = tokenizer.get_vocab()
    bos, eos = vocabulary[BOS], vocabulary[EOS]
    save_checkpoint(model, replace(config, dtype="bfloat16", bos_token_id=bos, eos_token_ids=(eos,)), folder)
    generation = {"do_sample": False, "bos_token_id": bos, "eos_token_id": eos}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, folder, config.max_position)
