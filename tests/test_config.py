"""Every key of the configuration is obeyed or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lamina_jax.config import ConfigError, EngineConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("placement", "both"),
        ("dtype", "float64"),
        ("kv_dtype", "float16"),
        ("microbatches", 3),
        ("overlap", "maybe"),
        ("page_size", 0),
        ("max_num_seqs", -1),
        ("max_waiting", 0),
        ("max_model_len", True),
        ("num_pages", 2.5),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.5),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    # Past the constructor, whose annotations the tests check before the class can.
    config = object.__new__(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        object.__setattr__(config, field.name, value if field.name == key else field.default)
    with pytest.raises(ConfigError, match=f"{key}.*{value!r}"):
        config.__post_init__()


def test_defaults_are_valid() -> None:
    assert EngineConfig().model == "bundled"
