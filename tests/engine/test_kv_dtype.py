"""`kv_dtype`: pages in a dtype of their own, on both placements, and nothing else changes."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_models import SMALL, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.engine.engine import Engine

PROMPTS = [[1, 2, 3] * 9, [5, 7] * 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny")))


def run(checkpoint: str, **settings: Any) -> tuple[list[list[int]], LLM]:
    llm = LLM(checkpoint, **settings, **SMALL)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0))
    assert llm.stats()["compilations_after_ready"] == 0
    return [output.outputs[0].token_ids for output in outputs], llm


def pages_of(engine: Engine) -> list[np.ndarray]:
    """The pages of every layer and device; 16-bit ones come as bits."""
    pages: list[np.ndarray] = []

    def keep(array: jax.Array) -> jax.Array:
        pages.append(np.asarray(array))
        return array

    runner: Any = engine.runner
    getattr(runner, "exchange", runner).fill_pages(keep)
    return pages


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"placement": "collocated"}, marks=pytest.mark.slow),
        {"memory_devices": "cpu:1", "overlap": "on"},
    ],
)
def test_a_float32_model_over_bfloat16_pages(checkpoint: str, settings: dict[str, Any]) -> None:
    """Layer 0's k and v depend on no page: there the pages are the float32 ones, rounded."""
    exact_tokens, exact = run(checkpoint, **settings)
    tokens, rounded = run(checkpoint, kv_dtype="bfloat16", **settings)
    found, expected = pages_of(rounded.engine)[0], pages_of(exact.engine)[0]
    assert (found.dtype, expected.dtype) == (np.uint16, np.float32)
    assert found.shape == expected.shape
    assert tokens == exact_tokens
    np.testing.assert_array_equal(found.view(ml_dtypes.bfloat16), expected.astype(ml_dtypes.bfloat16))
    assert np.abs(expected).max() > 0
    for key in ("wire_bytes_per_step", "wire_messages_per_step"):
        assert rounded.stats()[key] == exact.stats()[key]


def test_a_bfloat16_model_over_float32_pages(checkpoint: str) -> None:
    _, llm = run(checkpoint, dtype="bfloat16", kv_dtype="float32", memory_devices="cpu:1", overlap="off")
    for pages in pages_of(llm.engine):
        assert pages.dtype == np.float32
        assert np.abs(pages).max() > 0
        np.testing.assert_array_equal(pages, pages.astype(ml_dtypes.bfloat16).astype(np.float32))
