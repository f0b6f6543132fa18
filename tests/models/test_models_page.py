"""docs/models.md names everything that the readers of config.json take, and no architecture besides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from lamina_jax.models.config import Family
from lamina_jax.models.hf_config import DTYPES
from lamina_jax.models.hf_config import FAMILIES as ARCHITECTURES
from lamina_jax.models.hf_rope import ROPE_KEYS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    assert dict(re.findall(r"^\| (\w+ForCausalLM) \| (\w+) \|", PAGE, re.MULTILINE)) == ARCHITECTURES
    assert set(ARCHITECTURES.values()) == set(get_args(Family))
    assert f"| rope type | {', '.join(ROPE_KEYS)} |" in PAGE
    for dtype in DTYPES:
        assert dtype in PAGE
