"""Model-attention disaggregation (Lamina, arXiv 2405.01814) in JAX.

Public names are resolved when they are first used, so that importing a part that needs no jax (the
scheduler, the planner) loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina_jax.config import ConfigError as ConfigError
    from lamina_jax.core import RequestOutput as RequestOutput
    from lamina_jax.core import SamplingParams as SamplingParams
    from lamina_jax.llm import LLM as LLM
    from lamina_jax.ops import attention as attention
    from lamina_jax.ops import merge as merge
    from lamina_jax.slicing import slice_at_attention as slice_at_attention

__version__ = "0.1.0"

_HOME = {
    "LLM": "lamina_jax.llm",
    "SamplingParams": "lamina_jax.core",
    "RequestOutput": "lamina_jax.core",
    "ConfigError": "lamina_jax.config",
    "attention": "lamina_jax.ops",
    "merge": "lamina_jax.ops",
    "slice_at_attention": "lamina_jax.slicing",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'lamina_jax' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    return getattr(importlib.import_module(_HOME[name]), name)
