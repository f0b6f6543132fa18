"""Tensor parallelism of the disaggregated engine: the same tokens, the fewest collectives, weights cut."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, ConfigError, SamplingParams
from lamina_jax.core import StepPlan
from lamina_jax.engine.compute import ComputeSide, step_shapes
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.placement import bytes_per_device, place_weight
from lamina_jax.models import ModelConfig, Storage, as_function, build
from lamina_jax.pool.geometry import head_table
from lamina_jax.slicing import slice_at_attention
from lamina_jax.weights.loader import load_model

FEW_KV_HEADS = dataclasses.replace(TINY, num_kv_heads=2)
"""Fewer KV heads than the four devices that compute."""

MODELS = {4: TINY, 2: FEW_KV_HEADS}
"""By their number of KV heads."""

LENGTHS = (1, 8, 9, 40, 64, 17)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return {k: str(save_random(tmp_path_factory.mktemp("tiny"), config)) for k, config in MODELS.items()}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoints: dict[int, str], prompts: list[list[int]]) -> dict[int, list[list[int]]]:
    """The collocated models' tokens, on one device."""
    return {k: tokens_of(LLM(c, placement="collocated", **SMALL), prompts) for k, c in checkpoints.items()}


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0))
    return [output.outputs[0].token_ids for output in outputs]


def split(checkpoint: str, shards: int, workers: int, **settings: Any) -> LLM:
    """An engine that computes on `shards` devices, with its pages on `workers` others."""
    compute, memory = f"cpu:0-{shards - 1}", f"cpu:{shards}-{shards + workers - 1}"
    return LLM(checkpoint, compute_devices=compute, memory_devices=memory, **SMALL, **settings)


EVERY = list(itertools.product((4, 2), (1, 2, 4), (1, 2, 4), (1, 2), ("on", "off")))
EVERY = [case for case in EVERY if case[2] <= case[0]]  # workers divide the KV heads
SOME = [
    (4, 2, 1, 1, "on"),
    (4, 2, 2, 2, "on"),
    (4, 2, 4, 1, "off"),
    (4, 4, 2, 2, "off"),
    (4, 4, 4, 2, "on"),
    (2, 4, 1, 1, "off"),
    (2, 4, 2, 2, "on"),
]


@pytest.mark.parametrize(
    ("kv_heads", "shards", "workers", "microbatches", "overlap"),
    [pytest.param(*case, marks=[] if case in SOME else [pytest.mark.slow]) for case in EVERY],
)
def test_every_mesh_gives_the_collocated_tokens(
    checkpoints: dict[int, str],
    prompts: list[list[int]],
    expected: dict[int, list[list[int]]],
    kv_heads: int,
    shards: int,
    workers: int,
    microbatches: Any,
    overlap: Any,
) -> None:
    llm = split(checkpoints[kv_heads], shards, workers, microbatches=microbatches, overlap=overlap)
    assert tokens_of(llm, prompts) == expected[kv_heads]
    stats = llm.stats()
    assert stats["weight_devices"] == [f"cpu:{i}" for i in range(shards)]
    assert stats["page_devices"] == [f"cpu:{shards + i}" for i in range(workers)]
    assert stats["weight_bytes_per_device"] == weight_bytes(MODELS[kv_heads], shards)
    assert stats["compilations_after_ready"] == 0
    assert stats["pages_free"] == stats["pages_total"]


def weight_bytes(config: ModelConfig, shards: int) -> int:
    """Of each device, float32: a share of every matrix, at least one KV head, and the norms whole."""
    hidden, size = config.hidden_size, config.head_dim
    matrices = 2 * config.num_heads * size * hidden + 3 * config.intermediate_size * hidden
    kv = 2 * max(1, config.num_kv_heads // shards) * size * hidden
    norms = 2 * hidden + 2 * size
    vocabulary = 2 * config.vocab_size * hidden // shards
    return 4 * (config.num_layers * (matrices // shards + kv + norms) + vocabulary + hidden)


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize(("kv_heads", "shards", "workers"), [(4, 2, 4), (4, 4, 2), (2, 4, 2)])
def test_wire_is_that_of_one_device(
    checkpoints: dict[int, str],
    prompts: list[list[int]],
    kv_heads: int,
    shards: int,
    workers: int,
    overlap: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(2 + 2/G) e d B L + 4 N B L bytes whatever t and W, in a message each way per piece.

    With more shards than KV heads a message that holds q, k and v brings the copies along.
    """
    plans: list[StepPlan] = []
    dispatch = DisaggregatedRunner.dispatch

    def spy(self: DisaggregatedRunner, plan: StepPlan) -> Any:
        plans.append(plan)
        return dispatch(self, plan)

    monkeypatch.setattr(DisaggregatedRunner, "dispatch", spy)
    llm = split(checkpoints[kv_heads], shards, workers, overlap=overlap, prefill_stall_ms=math.inf)
    tokens_of(llm, prompts[:4])

    config, pieces = MODELS[kv_heads], max(shards, workers)
    head = 4 * config.head_dim
    q, lse, kv = config.num_heads * head, 4 * config.num_heads, 2 * kv_heads * head
    total = messages = 0
    for batch in (batch for plan in plans for batch in plan.microbatches):
        rows = config.num_layers * batch.bucket[0] * batch.bucket[1]
        together = batch.cached and overlap == "off"
        sent_kv = kv * max(1, shards // kv_heads) if together else kv
        total += rows * (sent_kv + (2 * q + lse if batch.cached else 0))
        messages += config.num_layers * (
            2 * pieces if together else min(pieces, kv_heads) + 2 * pieces * batch.cached
        )
    stats = llm.stats()
    assert stats["wire_bytes_per_step"] * stats["steps"] == pytest.approx(total)
    assert stats["wire_messages_per_step"] * stats["steps"] == pytest.approx(messages)


@pytest.mark.parametrize(("config", "shards"), [(TINY, 2), (TINY, 4), (FEW_KV_HEADS, 4)])
def test_a_slice_moves_activations_alone(tmp_path: Path, config: ModelConfig, shards: int) -> None:
    """One sum behind each of o_proj, down_proj and the embedding; at the end the logits are gathered."""
    mesh = Mesh(np.array(jax.devices()[:shards]), ("tensor",))
    table = head_table(config.num_heads, config.num_kv_heads, shards, 2)
    model = build(config, Storage(jnp.dtype(jnp.float32), "in_out"))
    place = partial(place_weight, mesh=mesh, head_dim=config.head_dim, copies=table.copies)
    load_model(save_random(tmp_path, config), model, place)
    fn, params = as_function(model)
    assert bytes_per_device(jax.tree.leaves(params)) == weight_bytes(config, shards)

    compute = ComputeSide(slice_at_attention(fn, params, *step_shapes((4, 2))), params, mesh, table, 4)
    found = {}
    for overlap in (True, False):
        for name, compile_program in compute.jobs((4, 1), cached=True, overlap=overlap):
            if name.startswith("slice"):
                compile_program()
                found[name.removesuffix(" (4, 1)")] = collectives(compile_program.__self__.compiled.as_text())
    assert found == {
        "slice 0 (query)": {"all-reduce": 1},
        "slice 0 (rest)": {},
        "slice 0 (whole)": {"all-reduce": 1},
        "slice 1 (query)": {"all-reduce": 2},
        "slice 1 (rest)": {},
        "slice 1 (whole)": {"all-reduce": 2},
        "slice 3 (last)": {"all-reduce": 2, "all-gather": 1},
    }


def collectives(hlo: str) -> dict[str, int]:
    """How many of each kind a compiled program has."""
    pattern = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    found = re.findall(pattern, hlo)
    return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize(
    ("compute", "memory", "words"),
    [
        ("cpu:0-2", "cpu:4", ["compute_devices", "3 devices", "8 query and 4 KV heads", "1, 2, 4, 8 would"]),
        ("cpu:0-5", "cpu:6-7", ["compute_devices", "6 devices", "2 memory devices"]),
    ],
)
def test_uneven_heads_are_refused(
    checkpoints: dict[int, str], compute: str, memory: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        LLM(checkpoints[4], compute_devices=compute, memory_devices=memory, **SMALL)
    for word in words:
        assert word in str(error.value)


def test_an_axis_that_does_not_divide_stays_whole(tmp_path: Path) -> None:
    """A vocabulary and a feed-forward size that two devices cannot share; the default memory devices."""
    odd = dataclasses.replace(TINY, vocab_size=161, intermediate_size=47)
    folder = str(save_random(tmp_path, odd))
    expected = tokens_of(LLM(folder, placement="collocated", **SMALL), [[1, 2, 3]])
    llm = LLM(folder, compute_devices="cpu:0-1", **SMALL)
    assert tokens_of(llm, [[1, 2, 3]]) == expected
    assert not {"cpu:0", "cpu:1"} & set(llm.stats()["page_devices"])


def test_the_log_says_who_talks_to_whom(
    checkpoints: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lamina_jax"):
        split(checkpoints[2], 4, 1)
    assert [line for line in caplog.messages if line.startswith("cpu")] == [
        "cpu:0 and cpu:4: query heads 0-1, KV heads 0-0",
        "cpu:1 and cpu:4: query heads 2-3, KV heads 0-0 (k and v come from a shard before)",
        "cpu:2 and cpu:4: query heads 4-5, KV heads 1-1",
        "cpu:3 and cpu:4: query heads 6-7, KV heads 1-1 (k and v come from a shard before)",
    ]
    assert "weights on each of 4 compute devices" in caplog.text
