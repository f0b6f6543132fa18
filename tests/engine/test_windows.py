"""Sliding windows on both placements: same tokens, and no programs of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax.config import EngineConfig
from lamina_jax.core import SamplingParams
from lamina_jax.engine.build import build_engine
from lamina_jax.llm import LLM
from lamina_jax.models import Storage, build
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.loader import load_model

WINDOWED = dataclasses.replace(TINY, family="qwen2", windows=(7, None, 7))
LENGTHS, NEW = (3, 7, 8, 60), 12
"""Prompts shorter than the window, as long, longer, and of several chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("windowed"), WINDOWED)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the plain model, every step from the start."""
    model = build(read_config(folder), Storage(jnp.dtype("float32")))
    load_model(folder, model)
    texts = [list(prompt) for prompt in prompts]
    length = max(LENGTHS) + NEW
    positions = jnp.arange(length, dtype=jnp.int32)
    for text in texts:
        for _ in range(NEW):
            tokens = jnp.asarray(text + [0] * (length - len(text)), jnp.int32)
            text.append(int(model(tokens, positions, jnp.asarray([len(text) - 1])).argmax()))
    return [text[-NEW:] for text in texts]


@pytest.mark.parametrize("settings", [{"overlap": "off"}, {"placement": "collocated"}])
def test_tokens_are_those_of_the_plain_model(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], settings: dict[str, Any]
) -> None:
    llm = LLM(str(folder), **settings, **SMALL)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW, temperature=0))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert llm.stats()["compilations_after_ready"] == 0


def test_windowed_layers_share_their_programs_with_the_others(folder: Path, tmp_path: Path) -> None:
    def programs(model: Path) -> int:
        totals = []
        config = EngineConfig(model=str(model), overlap="on", memory_devices="cpu:1", **SMALL)
        build_engine(config, lambda phase, done, total: totals.append(total))
        return max(totals)

    unwindowed: ModelConfig = dataclasses.replace(WINDOWED, windows=())
    assert programs(folder) == programs(save_random(tmp_path, unwindowed))
