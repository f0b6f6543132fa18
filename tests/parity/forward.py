"""Our plain forward pass over a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.models import Storage, build
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.loader import load_model

RELATIVE = 1e-4
"""How far logits may be from the reference's, in units of the largest of them."""


class Forward:
    """The model of a folder, compiled once for sequences of at most `length` tokens."""

    def __init__(
        self, folder: Path, length: int, layout: Literal["out_in", "in_out"], dtype: str = "float32"
    ) -> None:
        model = build(read_config(folder), Storage(jnp.dtype(dtype), layout))
        load_model(folder, model)
        self._length = length
        self._logits = jax.jit(lambda tokens, at: model(tokens, jnp.arange(length, dtype=jnp.int32), at))

    def last_logits(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """float32[count, V] at the last positions of int32[T]. Padding lies behind, where none looks."""
        padded = np.zeros(self._length, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._logits(padded, np.arange(len(tokens) - count, len(tokens), dtype=np.int32)))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()
