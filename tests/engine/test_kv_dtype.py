"""`kv_dtype`: pages in a dtype of their own, on both placements, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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


Run = Callable[..., tuple[list[list[int]], LLM]]


@pytest.fixture(scope="module")
def exact(checkpoint: str) -> Run:
    """`run` over float32 pages, once for the same settings."""
    once = cache(lambda *settings: run(checkpoint, **dict(settings)))
    return lambda **settings: once(*settings.items())


def run(checkpoint: str, *, max_tokens: int = 12, **settings: Any) -> tuple[list[list[int]], LLM]:
    llm = LLM(checkpoint, **settings, **SMALL)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=max_tokens, temperature=0))
    assert llm.stats()["compilations_after_ready"] == 0
    return [output.outputs[0].token_ids for output in outputs], llm


def pages_of(engine: Engine) -> list[np.ndarray]:
    """The pages of every layer and device; 16-bit ones come as bits, quantised ones as two arrays."""
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
def test_a_float32_model_over_bfloat16_pages(checkpoint: str, exact: Run, settings: dict[str, Any]) -> None:
    """Layer 0's k and v depend on no page: there the pages are the float32 ones, rounded."""
    exact_tokens, unrounded = exact(**settings)
    tokens, rounded = run(checkpoint, kv_dtype="bfloat16", **settings)
    found, expected = pages_of(rounded.engine)[0], pages_of(unrounded.engine)[0]
    assert (found.dtype, expected.dtype) == (np.uint16, np.float32)
    assert found.shape == expected.shape
    assert tokens == exact_tokens
    np.testing.assert_array_equal(found.view(ml_dtypes.bfloat16), expected.astype(ml_dtypes.bfloat16))
    assert np.abs(expected).max() > 0
    for key in ("wire_bytes_per_step", "wire_messages_per_step"):
        assert rounded.stats()[key] == unrounded.stats()[key]


@pytest.mark.parametrize(
    ("kv_dtype", "stored", "rounding", "settings"),
    [
        ("int8", np.int8, 0.5 / 127, {"memory_devices": "cpu:1", "overlap": "on"}),
        *(
            pytest.param(*kind, settings, marks=pytest.mark.slow)
            for kind in (("int8", np.int8, 0.5 / 127), ("fp8", np.uint8, 2.0**-4))
            for settings in ({"placement": "collocated"}, {"memory_devices": "cpu:1-2", "overlap": "off"})
        ),
    ],
)
def test_a_float32_model_over_quantised_pages(
    checkpoint: str, exact: Run, kv_dtype: str, stored: type, rounding: float, settings: dict[str, Any]
) -> None:
    """Layer 0's k and v are the float32 ones but for half a step of their token's and head's own scale.

    Of the prompts: rounded pages may lead to other tokens, and then other k and v are cached."""
    _, unrounded = exact(max_tokens=1, **settings)
    _, quantised = run(checkpoint, max_tokens=1, kv_dtype=kv_dtype, **settings)
    (expected, *_), (values, scales, *_) = pages_of(unrounded.engine), pages_of(quantised.engine)
    assert (values.dtype, scales.dtype) == (stored, np.float32)
    assert (values.shape, scales.shape) == (expected.shape, expected.shape[:-1])
    values = values if kv_dtype == "int8" else values.view(ml_dtypes.float8_e4m3fn)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    error = np.abs(values.astype(np.float32) * scales[..., None] - expected)
    assert largest.max() > 0
    assert np.all(error <= largest * rounding * (1 + 1e-5))
    assert quantised.stats()["wire_bytes_per_step"] == unrounded.stats()["wire_bytes_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
def test_workers_quantise_as_one_process_does(
    checkpoint: str, workers: Callable[..., str], kv_dtype: str, partition: str
) -> None:
    expected, collocated = run(checkpoint, placement="collocated", kv_dtype=kv_dtype)
    collocated.close()
    tokens, llm = run(checkpoint, attention=workers(2), partition=partition, kv_dtype=kv_dtype)
    llm.close()
    assert tokens == expected


def test_a_bfloat16_model_over_float32_pages(checkpoint: str) -> None:
    _, llm = run(checkpoint, dtype="bfloat16", kv_dtype="float32", memory_devices="cpu:1", overlap="off")
    for pages in pages_of(llm.engine):
        assert pages.dtype == np.float32
        assert np.abs(pages).max() > 0
        np.testing.assert_array_equal(pages, pages.astype(ml_dtypes.bfloat16).astype(np.float32))
