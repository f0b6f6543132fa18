"""Reads a decoder's shape from a Hugging Face folder: `config.json` and `generation_config.json`.

Both generations of keys are read: `rope_theta` with `rope_scaling` and `rope_parameters`, `torch_dtype`
and `dtype`. What this package cannot compute is refused here by name. No weights and no jax.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

from lamina_jax.models.config import ModelConfig, RopeConfig

FAMILIES: dict[str, Literal["llama", "qwen3"]] = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
"""Supported `architectures`."""

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}
"""The dtype that a checkpoint of each dtype is served in."""

T = TypeVar("T", int, float, bool, str, list, dict)


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file, what is wrong and what to do."""


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
    _refuse_unsupported(section)
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
        num_layers=section.require("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(section, family, num_heads),
        max_position=section.require("max_position_embeddings", int),
        rms_norm_eps=section.get("rms_norm_eps", float, 1e-6),
        rope=_rope(section),
        tie_embeddings=section.get("tie_word_embeddings", bool, False),
        attention_bias=section.get("attention_bias", bool, False),
        mlp_bias=section.get("mlp_bias", bool, False),
        dtype=_dtype(section),
        bos_token_id=next(iter(_token_ids("bos_token_id", generation, section)), None),
        eos_token_ids=_token_ids("eos_token_id", generation, section),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or not one JSON object; says where it breaks off.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


class Section:
    """A JSON object whose keys are read with a type; null counts as absent. `where` names it in errors."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} = {value!r}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str, kind: type[T]) -> T:
        """The key's value. Numbers must be positive."""
        if not self.has(key):
            raise CheckpointError(f"{self.where}: the key {key} is missing")
        value = self.values[key]
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**53 else math.inf
        if type(value) is not kind:
            raise self.error(key, value, f"a value of type {kind.__name__}")
        if kind is not bool and isinstance(value, int | float) and not 0 < value < math.inf:
            raise self.error(key, value, "a positive number")
        return value

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The key's value, or the default where it is absent."""
        return self.require(key, kind) if self.has(key) else default


def _family(section: Section) -> Literal["llama", "qwen3"]:
    architectures = section.require("architectures", list)
    for name in architectures:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise section.error("architectures", architectures, f"one of {', '.join(FAMILIES)}")


def _refuse_unsupported(section: Section) -> None:
    if section.get("hidden_act", str, "silu") != "silu":
        raise section.error("hidden_act", section.values["hidden_act"], "'silu', the only one supported")
    if section.has("quantization_config"):
        quantised = section.require("quantization_config", dict)
        raise section.error(
            "quantization_config", quantised, "none: use a checkpoint in float32, float16 or bfloat16"
        )
    _refuse_partial_rotary(section)
    _refuse_sliding_window(section)


def _refuse_partial_rotary(section: Section) -> None:
    factor = section.get("partial_rotary_factor", float, 1.0)
    if factor != 1.0:
        raise section.error(
            "partial_rotary_factor", factor, "1.0: rotating a part of a head is not supported"
        )


def _refuse_sliding_window(section: Section) -> None:
    """A window is in use where a layer says so, or `use_sliding_window`; else it is a mere default."""
    layers = section.get("layer_types", list, [])
    if any(layer != "full_attention" for layer in layers):
        raise section.error("layer_types", layers, "'full_attention' for every layer")
    if not layers and section.get("use_sliding_window", bool, False) and section.has("sliding_window"):
        window = section.values["sliding_window"]
        raise section.error("sliding_window", window, "none in use: set use_sliding_window to false")


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


ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
}
"""The keys that each rope type needs, and the fields of `RopeConfig` that they fill."""


def _rope(section: Section) -> RopeConfig:
    """`rope_parameters`, or `rope_theta` and `rope_scaling`; where a file has both they must agree."""
    theta = section.get("rope_theta", float, 10000.0)
    found = [
        _rope_from(Section(section.require(key, dict), f"{section.where}: {key}"), theta)
        for key in ("rope_parameters", "rope_scaling")
        if section.has(key)
    ]
    if len(set(found)) > 1:
        raise section.error(
            "rope_scaling", section.values["rope_scaling"], "the same as rope_parameters: remove one"
        )
    return found[0] if found else RopeConfig(theta=theta)


def _rope_from(section: Section, theta: float) -> RopeConfig:
    kind_key = "rope_type" if section.has("rope_type") else "type"
    kind = section.get(kind_key, str, "default")
    if kind not in ROPE_KEYS:
        raise section.error(kind_key, kind, f"one of {', '.join(ROPE_KEYS)}")
    _refuse_partial_rotary(section)
    keys = ROPE_KEYS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *keys}
    for key in section.values:
        if section.has(key) and key not in known:
            raise section.error(key, section.values[key], f"no such key with {kind_key} = {kind!r}")
    fields: dict[str, Any] = {
        field: section.require(key, int if field == "original_max_position" else float)
        for key, field in keys.items()
    }
    rope = RopeConfig(theta=section.get("rope_theta", float, theta), scaling=kind, **fields)  # type: ignore[arg-type]
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise section.error(
            "high_freq_factor", rope.high_freq_factor, f"more than low_freq_factor = {rope.low_freq_factor}"
        )
    return rope


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
