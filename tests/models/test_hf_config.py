"""config.json: both generations of keys, and every refusal names the file, the key, the value, the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.models.config import ModelConfig, RopeConfig
from lamina_jax.models.hf_config import CheckpointError, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, config: object, generation: object = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


def test_llama(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == ModelConfig(
        family="llama",
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        eos_token_ids=(2,),
    )


def test_qwen3_has_heads_of_their_own_size(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3 | {"use_sliding_window": False, "sliding_window": 4096})
    assert (config.family, config.head_dim, config.tie_embeddings) == ("qwen3", 16, True)


def test_qwen2_has_biases_on_q_k_and_v(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN2)
    assert (config.family, config.attention_bias, config.head_dim, config.windows) == ("qwen2", True, 8, ())


FULL, SLIDING = "full_attention", "sliding_attention"
IN_USE = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (MISTRAL | {"sliding_window": 5}, (5, 5)),
        (MISTRAL | {"sliding_window": 5, "layer_types": [SLIDING] * 2}, (5, 5)),
        (MISTRAL, (4096, 4096)),
        (MISTRAL | {"sliding_window": None, "layer_types": [FULL] * 2}, ()),
        (QWEN2 | {"sliding_window": 5, "max_window_layers": 0}, ()),
        (QWEN2 | IN_USE, ()),
        (QWEN2 | IN_USE | {"max_window_layers": 0}, (5, 5)),
        (QWEN2 | IN_USE | {"max_window_layers": 1}, (None, 5)),
        (QWEN3 | IN_USE | {"max_window_layers": 1}, (None, 5)),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, (None, 4096)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, ()),
        (QWEN2 | IN_USE | {"layer_types": [SLIDING, FULL], "max_window_layers": 1}, (5, None)),
    ],
)
def test_windows_of_layers(tmp_path: Path, keys: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    """The values are those of transformers; absent and null differ."""
    assert read(tmp_path, keys).windows == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (MISTRAL | {"sliding_window": 0}, "sliding_window = 0, expected a positive"),
        (MISTRAL | {"layer_types": [FULL, SLIDING]}, "layer_types = .*'sliding_attention' for every layer"),
        (MISTRAL | {"sliding_window": None, "layer_types": [SLIDING] * 2}, "layer_types = .*no window"),
        (MISTRAL | {"attention_bias": True}, "attention_bias = True, expected false, as mistral has it"),
        (QWEN2 | {"attention_bias": False}, "attention_bias = False, expected true, as qwen2 has it"),
        (QWEN2 | {"mlp_bias": True}, "mlp_bias = True"),
        (QWEN2 | IN_USE | {"max_window_layers": -1}, "max_window_layers = -1, expected a number of layers"),
        (QWEN2 | IN_USE | {"layer_types": [SLIDING]}, "layer_types = .*each of 2 layers"),
        (QWEN2 | IN_USE | {"layer_types": [SLIDING, "chunked_attention"]}, "layer_types = .*chunked"),
        (QWEN2 | {"layer_types": [FULL, SLIDING]}, "layer_types = .*no window is in use"),
        (LLAMA | IN_USE, "sliding_window = 5.*use_sliding_window to false"),
    ],
)
def test_windows_and_biases_that_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*" + message):
        read(tmp_path, keys)


def test_null_is_absent_and_num_key_value_heads_defaults_to_the_query_heads(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        LLAMA | {"num_key_value_heads": None, "rope_scaling": None, "head_dim": None, "bos_token_id": None},
    )
    assert (config.num_kv_heads, config.head_dim, config.rope, config.bos_token_id) == (
        6,
        8,
        RopeConfig(),
        None,
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RopeConfig(theta=10000.0)),
        ({"rope_theta": 500000}, RopeConfig(theta=500000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(theta=1e6)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(theta=5e5, scaling="linear", factor=2.0),
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            RopeConfig(theta=5e5, scaling="linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            RopeConfig(theta=5e5, scaling="llama3", factor=8.0),
        ),
        (
            {
                "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5},
                "rope_scaling": LLAMA3_ROPE,
                "rope_theta": 5e5,
            },
            RopeConfig(theta=5e5, scaling="llama3", factor=8.0),
        ),
    ],
)
def test_both_generations_of_rope_keys(tmp_path: Path, keys: dict[str, Any], expected: RopeConfig) -> None:
    assert read(tmp_path, LLAMA | keys).rope == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_both_generations_of_the_dtype_key(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert read(tmp_path, LLAMA | keys).dtype == expected


def test_the_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    config = read(tmp_path, LLAMA, {"eos_token_id": [7, 8], "bos_token_id": 1})
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 8), 1)
    assert read(tmp_path, LLAMA, {"temperature": 0.6}).eos_token_ids == (2,)


REFUSED = {
    "architecture": ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM, Mistral"),
    "no architecture": ({"architectures": None}, "architectures is missing"),
    "missing key": ({"hidden_size": None}, "hidden_size is missing"),
    "text for a number": ({"vocab_size": "128"}, "vocab_size = '128', expected a value of type int"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    "float for an int": ({"hidden_size": 48.0}, "hidden_size = 48.0"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads = 0, expected a positive"),
    "text for a flag": ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'.*bool"),
    "heads that do not divide": (
        {"num_key_value_heads": 4},
        "num_key_value_heads = 4, expected a divisor.*6",
    ),
    "heads that do not divide the width": (
        {"hidden_size": 50},
        "num_attention_heads = 6.*50, or the key head_dim",
    ),
    "odd head_dim": ({"head_dim": 7}, "head_dim = 7, expected an even"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu', expected 'silu'"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = .*awq.*float32"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial rotary, new": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "window": ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64.*use_sliding_window"),
    "window of a layer": ({"layer_types": ["sliding_attention"] * 2}, "layer_types = .*sliding_attention"),
    "rope type": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_type = 'yarn'.*linear, llama3",
    ),
    "old rope type": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling: type = 'dynamic'"),
    "rope key": (
        {"rope_scaling": {"type": "linear", "factor": 4.0, "mrope_section": [1]}},
        "mrope_section = .*no such key with type = 'linear'",
    ),
    "rope key missing": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the key factor is missing"),
    "rope factors": ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor = 1.0"),
    "rope twice": (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "the same as rope_parameters",
    ),
    "dtype": ({"torch_dtype": "float8"}, "torch_dtype = 'float8', expected one of float32"),
    "end token": ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
    "end tokens": ({"eos_token_id": [1, -1]}, r"eos_token_id = \[1, -1\]"),
    "not a number": ({"rope_theta": float("nan")}, "rope_theta = nan"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*" + message):
        read(tmp_path, LLAMA | keys)


def test_a_generation_config_is_checked_as_well(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id = 'x'"):
        read(tmp_path, LLAMA, {"eos_token_id": "x"})


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder 'org/name'.*downloaded"):
        read_config(Path("org/name"))
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: No such file"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", "[" * 100_000, "9" * 10_000])
def test_a_file_that_holds_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_config(tmp_path)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


MORE_KEYS = ["rope_scaling", "rope_parameters", "layer_types", "quantization_config", "sliding_window",
             "max_window_layers", "use_sliding_window"]  # fmt: skip


@given(key=st.sampled_from([*QWEN3, *MORE_KEYS]), value=ANYTHING)
def test_any_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("model")
    try:
        config = read(folder, QWEN3 | {key: value})
    except CheckpointError as error:
        assert key in str(error) or "num_attention_heads" in str(error)
    else:
        assert config.num_heads % config.num_kv_heads == 0
