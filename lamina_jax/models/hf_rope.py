"""The rotary embedding that a Hugging Face `config.json` asks for, in both generations of its keys."""

from __future__ import annotations

from typing import Any

from lamina_jax.models.config import RopeConfig
from lamina_jax.models.hf_section import Section

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


def read_rope(section: Section) -> RopeConfig:
    """From `rope_parameters`, or `rope_theta` and `rope_scaling`; where a file has both they must agree."""
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
    refuse_partial_rotary(section)
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


def refuse_partial_rotary(section: Section) -> None:
    factor = section.get("partial_rotary_factor", float, 1.0)
    if factor != 1.0:
        raise section.error(
            "partial_rotary_factor", factor, "1.0: rotating a part of a head is not supported"
        )
