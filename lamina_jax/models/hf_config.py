"""Reads a decoder's shape from a Hugging Face folder: `config.json` and `generation_config.json`.

Both generations of keys are read: `rope_theta` with `rope_scaling` and `rope_parameters`, `torch_dtype`
and `dtype`. What this package cannot compute is refused here by name. No weights and no jax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lamina_jax.config import CheckpointError
from lamina_jax.models.config import Family, ModelConfig
from lamina_jax.models.hf_rope import read_rope, refuse_partial_rotary
from lamina_jax.models.hf_section import Section, read_json_object
from lamina_jax.models.hf_windows import read_windows

__all__ = ["DTYPES", "FAMILIES", "CheckpointError", "read_config", "read_json_object"]

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Supported `architectures`."""

FIXED_BIASES: dict[Family, dict[str, bool]] = {
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "mlp_bias": False},
    "qwen3": {"mlp_bias": False},
}
"""Families that leave no choice; "attention_bias" of Qwen2 is that of q, k and v."""

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}
"""The dtype that a checkpoint of each dtype is served in."""


def read_config(folder: Path) -> ModelConfig:
    """The model of a Hugging Face folder.

    Token ids of `generation_config.json`, where there is one, win over those of `config.json`. A missing
    dtype reads as float32, which holds every other. `pretraining_tp` only ever chose how products were
    summed, and is ignored.

    Raises:
        CheckpointError: a file or key that is missing, of a wrong type, or asks for what is unsupported.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {str(folder)!r}: give the path of a downloaded Hugging Face model, "
            f"with config.json and *.safetensors in it"
        )
    section = Section(read_json_object(folder / "config.json"), "config.json")
    family = _family(section)
    _refuse_unsupported(section, family)
    num_layers = section.require("num_hidden_layers", int)
    num_heads = section.require("num_attention_heads", int)
    num_kv_heads = section.get("num_key_value_heads", int, num_heads)
    if num_heads % num_kv_heads:
        raise section.error(
            "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}"
        )
    generation = _generation_section(folder)
    return ModelConfig(
        family=family,
        vocab_size=section.require("vocab_size", int),
        hidden_size=section.require("hidden_size", int),
        intermediate_size=section.require("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(section, family, num_heads),
        max_position=section.require("max_position_embeddings", int),
        rms_norm_eps=section.get("rms_norm_eps", float, 1e-6),
        rope=read_rope(section),
        windows=read_windows(section, family, num_layers),
        tie_embeddings=section.get("tie_word_embeddings", bool, False),
        attention_bias=section.get("attention_bias", bool, family == "qwen2"),
        mlp_bias=section.get("mlp_bias", bool, False),
        dtype=_dtype(section),
        bos_token_id=next(iter(_token_ids("bos_token_id", generation, section)), None),
        eos_token_ids=_token_ids("eos_token_id", generation, section),
    )


def _family(section: Section) -> Family:
    architectures = section.require("architectures", list)
    for name in architectures:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise section.error("architectures", architectures, f"one of {', '.join(FAMILIES)}")


def _refuse_unsupported(section: Section, family: Family) -> None:
    if section.get("hidden_act", str, "silu") != "silu":
        raise section.error("hidden_act", section.values["hidden_act"], "'silu', the only one supported")
    if section.has("quantization_config"):
        quantised = section.require("quantization_config", dict)
        raise section.error(
            "quantization_config", quantised, "none: use a checkpoint in float32, float16 or bfloat16"
        )
    for key, value in FIXED_BIASES.get(family, {}).items():
        if section.get(key, bool, value) != value:
            raise section.error(key, not value, f"{str(value).lower()}, as {family} has it")
    refuse_partial_rotary(section)


def _head_dim(section: Section, family: str, num_heads: int) -> int:
    if family == "qwen3":
        head_dim = section.get("head_dim", int, 128)
    else:
        hidden = section.require("hidden_size", int)
        if hidden % num_heads and not section.has("head_dim"):
            raise section.error(
                "num_attention_heads", num_heads, f"a divisor of hidden_size = {hidden}, or the key head_dim"
            )
        head_dim = section.get("head_dim", int, hidden // num_heads)
    if head_dim % 2:
        raise section.error("head_dim", head_dim, "an even number, as rotary positions need")
    return head_dim


def _dtype(section: Section) -> Literal["float32", "bfloat16"]:
    key = "dtype" if section.has("dtype") else "torch_dtype"
    name = section.get(key, str, "float32")
    if name not in DTYPES:
        raise section.error(key, name, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _generation_section(folder: Path) -> Section:
    path = folder / "generation_config.json"
    return Section(read_json_object(path) if path.exists() else {}, path.name)


def _token_ids(key: str, *sections: Section) -> tuple[int, ...]:
    """A token id, or a list of them, from the first section that has the key."""
    for section in sections:
        if section.has(key):
            value = section.values[key]
            ids = value if isinstance(value, list) else [value]
            if any(type(token) is not int or token < 0 for token in ids):
                raise section.error(key, value, "a token id, or a list of token ids")
            return tuple(ids)
    return ()
