"""`cpu_kernels`: whole engines give with the native kernels what they give with XLA's.

Skipped where no compiler is found.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, SamplingParams, cpu_kernels
from lamina_jax.config import ConfigError
from pallas_kernels import native

PROMPTS = [[1, 2, 3] * 9, [5, 7] * 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of a size that the native kernel takes."""
    return save_random(tmp_path_factory.mktemp("tiny"), replace(TINY, head_dim=16))


@pytest.fixture
def compiled() -> None:
    try:
        native.load()
    except native.BuildError as error:
        pytest.skip(str(error))


def tokens(checkpoint: Path, **settings: Any) -> tuple[list[list[int]], dict[str, Any]]:
    llm = LLM(str(checkpoint), **SMALL, **settings)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0))
    stats = llm.stats()
    llm.close()
    assert stats["compilations_after_ready"] == 0
    return [output.outputs[0].token_ids for output in outputs], stats


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "settings",
    [
        {"memory_devices": "cpu:1", "overlap": "on"},
        pytest.param({"memory_devices": "cpu:1-2"}, marks=pytest.mark.slow),
        pytest.param({"placement": "collocated"}, marks=pytest.mark.slow),
        pytest.param({"compute_devices": "cpu:0-1", "memory_devices": "cpu:2"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_xla(checkpoint: Path, settings: dict[str, Any]) -> None:
    """In float32, prompts of several chunks among them."""
    expected, without = tokens(checkpoint, cpu_kernels="xla", **settings)
    found, with_native = tokens(checkpoint, cpu_kernels="native", **settings)
    assert found == expected
    assert (without["native_kernels"], with_native["native_kernels"]) == (False, True)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "fp8"])
def test_in_bfloat16_products_and_pages_are_native(checkpoint: Path, kv_dtype: str) -> None:
    """Logits this far apart leave no near-ties to rounding."""
    settings = {"dtype": "bfloat16", "kv_dtype": kv_dtype, "memory_devices": "cpu:1"}
    expected, _ = tokens(checkpoint, cpu_kernels="xla", **settings)
    found, _ = tokens(checkpoint, cpu_kernels="native", **settings)
    assert [row[:3] for row in found] == [row[:3] for row in expected]


@pytest.mark.usefixtures("compiled")
def test_one_memory_device_is_enough(checkpoint: Path) -> None:
    _, stats = tokens(checkpoint)
    assert len(stats["page_devices"]) == 1


def test_native_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_missing", lambda: "no C++ compiler")
    (device, *_) = jax.devices("cpu")
    assert cpu_kernels.use_native("auto", device) is False
    with pytest.raises(ConfigError, match=r"cpu_kernels=native: no C\+\+ compiler; install"):
        cpu_kernels.use_native("native", device)
