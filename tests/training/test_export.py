"""An exported folder is Hugging Face's: its names, orders and dtypes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig, RopeConfig, Storage, build, initialise
from lamina_jax.training.export import export
from lamina_jax.weights.export import checkpoint_tensors, to_hf


@pytest.fixture
def model(tiny_config: ModelConfig):  # type: ignore[no-untyped-def]
    model = build(tiny_config, Storage(jnp.dtype("float32"), "in_out"))
    initialise(model, seed=0)
    return model


def test_the_folder_has_every_file(
    model, tiny_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    export(model, tiny_config, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == [tokenizer.token_to_id("<|eos|>")]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 64)
    assert "lm_head.weight" not in tensors, "tied to the embedding"


def test_matrices_are_stored_out_in_whatever_the_model_holds(tiny_config: ModelConfig) -> None:
    tensors = []
    for layout in ("in_out", "out_in"):
        model = build(tiny_config, Storage(jnp.dtype("float32"), layout))
        initialise(model, seed=0)
        tensors.append((model, checkpoint_tensors(model, "bfloat16")))
    (turned, ours), (straight, theirs) = tensors
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(ours[name], turned.blocks[0].mlp.up.weight[...].T.astype(jnp.bfloat16))
    np.testing.assert_array_equal(theirs[name], straight.blocks[0].mlp.up.weight[...].astype(jnp.bfloat16))


def test_a_scaling_that_is_not_written_is_refused(tiny_config: ModelConfig) -> None:
    scaled = replace(tiny_config, rope=RopeConfig(scaling="linear", factor=2.0))
    with pytest.raises(ValueError, match="linear"):
        to_hf(scaled)
