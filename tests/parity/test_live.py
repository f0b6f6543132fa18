"""Our logits against those of transformers for any small model. Needs torch: `make test-parity`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from forward import Forward, assert_close
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

ROPES = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 8)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 32),
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(3, 8),
            "original_max_position_embeddings": st.integers(16, 128),
        }
    ),
)

FAMILIES = [
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of any family and either generation of keys."""
    family, architecture = draw(st.sampled_from(FAMILIES))
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 4))
    config = {
        "architectures": [architecture],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": draw(st.integers(50, 90)),
        "hidden_size": num_heads * 2 * draw(st.integers(2, 6)),
        "intermediate_size": draw(st.integers(8, 40)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family != "qwen2":
        config["head_dim"] = 2 * draw(st.integers(2, 9))
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family != "llama":
        config["sliding_window"] = draw(st.none() | st.integers(1, 100))
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = draw(st.booleans())
        config["max_window_layers"] = draw(st.integers(0, 2))
    rope, theta = draw(ROPES), draw(st.floats(100, 1e6))
    if draw(st.booleans()):
        return config | {"dtype": "float32", "rope_parameters": rope | {"rope_theta": theta}}
    return config | {"torch_dtype": "float32", "rope_theta": theta, "rope_scaling": rope}


@pytest.mark.parity
@pytest.mark.timeout(600)
@settings(max_examples=25, deadline=None, phases=[Phase.generate])  # shrinking would take minutes
@given(config=configs(), seed=st.integers(0, 2**16))
def test_any_small_model(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], seed: int) -> None:
    import torch
    from reference import load, random_tensors
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(folder, seed), folder / "model.safetensors")
    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], size=90).astype(np.int32)
    with torch.inference_mode():
        expected = load(folder)(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert_close(Forward(folder, 90, "out_in").last_logits(tokens, 90), expected)
