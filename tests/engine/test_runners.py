"""Disaggregated decoding gives the collocated model's tokens, is disaggregated, and recompiles nothing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, ConfigError, SamplingParams
from lamina_jax.core import StepPlan
from lamina_jax.engine.disaggregated import DisaggregatedRunner

LENGTHS = (1, 3, 8, 9, 40, 64, 17)
"""Prompts shorter and longer than a page and than a chunk, more of them than there are seats."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint: str, prompts: list[list[int]]) -> list[list[int]]:
    """The collocated model's tokens, each prompt on its own and in one chunk."""
    llm = LLM(checkpoint, placement="collocated", **(SMALL | {"max_prefill_tokens": 64}))
    return [tokens_of(llm, [prompt])[0] for prompt in prompts]


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0))
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


EVERY = list(itertools.product(("cpu:1", "cpu:1-2", "cpu:1-4"), (1, 2), ("on", "off")))
SOME = [("cpu:1", 1, "off"), ("cpu:1", 2, "on"), ("cpu:1-4", 1, "on"), ("cpu:1-4", 2, "off")]
"""Those of the default run; the others are `slow`."""


@pytest.mark.parametrize(
    ("memory", "microbatches", "overlap"),
    [pytest.param(*case, marks=[] if case in SOME else [pytest.mark.slow]) for case in EVERY],
)
def test_disaggregated_equals_collocated(
    checkpoint: str,
    prompts: list[list[int]],
    expected: list[list[int]],
    memory: str,
    microbatches: Any,
    overlap: Any,
) -> None:
    llm = LLM(checkpoint, memory_devices=memory, microbatches=microbatches, overlap=overlap, **SMALL)
    assert tokens_of(llm, prompts) == expected
    assert tokens_of(llm, prompts[2:3]) == expected[2:3]

    stats = llm.stats()
    memory_devices = stats["page_devices"]
    assert stats["weight_devices"] == ["cpu:0"]
    assert "cpu:0" not in memory_devices
    assert len(memory_devices) == {"cpu:1": 1, "cpu:1-2": 2, "cpu:1-4": 4}[memory]
    assert stats["compilations_after_ready"] == 0
    assert stats["pages_free"] == stats["pages_total"]


def test_collocated_over_two_devices_and_in_batches(
    checkpoint: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = LLM(checkpoint, placement="collocated", compute_devices="cpu:0-1", **SMALL)
    assert tokens_of(llm, prompts) == expected
    assert llm.stats()["page_devices"] == ["cpu:0", "cpu:1"]
    assert llm.stats()["compilations_after_ready"] == 0


def test_both_meshes_may_be_one_device(
    checkpoint: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = LLM(checkpoint, compute_devices="cpu:0", memory_devices="cpu:0", **SMALL)
    assert tokens_of(llm, prompts) == expected


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_wire_bytes_equal_the_formula(
    checkpoint: str, prompts: list[list[int]], overlap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per step (2 + 2/G) e d B L + 4 N B L; a prefill without a cached part sends k and v alone."""
    plans: list[StepPlan] = []
    dispatch = DisaggregatedRunner.dispatch

    def spy(self: DisaggregatedRunner, plan: StepPlan) -> Any:
        plans.append(plan)
        return dispatch(self, plan)

    monkeypatch.setattr(DisaggregatedRunner, "dispatch", spy)
    llm = LLM(checkpoint, memory_devices="cpu:1-2", overlap=overlap, prefill_stall_ms=math.inf, **SMALL)
    tokens_of(llm, prompts)

    layers, heads, width, item = TINY.num_layers, TINY.num_heads, TINY.num_heads * TINY.head_dim, 4
    kv = 2 * width * TINY.num_kv_heads / heads
    total = messages = programs = 0.0
    for batch in (batch for plan in plans for batch in plan.microbatches):
        rows = batch.bucket[0] * batch.bucket[1]
        sent = 2 * width + kv if batch.cached else kv
        total += layers * rows * (sent * item + (4 * heads if batch.cached else 0))
        messages += layers * 2 * ({"on": 3, "off": 2}[overlap] if batch.cached else 1)
        # A slice of two stages is two programs, a message to a worker one; then what feeds the tokens
        # back, and, unless it is a chunk that ends no prompt, the last slice and the sampler.
        programs += layers * (6 if batch.cached and overlap == "on" else 3)
        programs += (batch.kind == "decode") + (2 if batch.samples.any() else 0)
    stats = llm.stats()
    assert stats["wire_bytes_per_step"] * stats["steps"] == pytest.approx(total)
    assert stats["wire_messages_per_step"] * stats["steps"] == pytest.approx(messages)
    assert stats["programs_per_step"] * stats["steps"] == pytest.approx(programs)


@pytest.mark.slow
def test_bfloat16_pages_hold_what_was_appended(tmp_path: Path, prompts: list[list[int]]) -> None:
    """In bfloat16 on one bucket the split changes where things are computed, not what."""
    import dataclasses

    folder = str(save_random(tmp_path, dataclasses.replace(TINY, dtype="bfloat16", head_dim=16)))
    collocated = tokens_of(LLM(folder, placement="collocated", **SMALL), prompts)
    disaggregated = tokens_of(LLM(folder, **SMALL), prompts)
    agreed = np.mean([np.mean(np.equal(a, b)) for a, b in zip(collocated, disaggregated, strict=True)])
    assert agreed > 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory_devices": "cpu:1-3"}, ["3 devices", "4 KV heads", "1, 2, 4"]),
        ({"memory_devices": "cpu:99"}, ["memory_devices", "cpu:99"]),
        ({"compute_devices": "tpu:0"}, ["compute_devices", "tpu"]),
        ({"compute_devices": "cpu:x"}, ["compute_devices", "numbers and ranges"]),
        ({"max_model_len": 10_000}, ["max_model_len", "256"]),
        ({"num_pages": 0}, ["num_pages"]),
        ({"memory_fraction": 1e-9}, ["--memory-fraction=1e-09", "smaller model"]),
        ({"num_pages": 10**9}, ["--num-pages=1000000000"]),
    ],
)
def test_settings_are_obeyed_or_refused(checkpoint: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        LLM(checkpoint, **{**SMALL, **settings})
    for word in words:
        assert word in str(error.value)


def test_an_unknown_setting_is_named(checkpoint: str) -> None:
    with pytest.raises(TypeError, match="max_modle_len"):
        LLM(checkpoint, max_modle_len=3)
