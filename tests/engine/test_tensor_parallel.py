"""Tensor parallelism of the disaggregated engine: the same tokens, the fewest collectives, weights cut."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, ConfigError, SamplingParams
from lamina_jax.compilation import Compiled, Job, compile_all
from lamina_jax.core import StepPlan
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.programs import gathered_logits
from lamina_jax.models import ModelConfig
from lamina_jax.models.layers import matmul
from lamina_jax.pool.geometry import head_table

SHALLOW = dataclasses.replace(TINY, num_layers=2)

SETTINGS: dict[str, Any] = {**SMALL, "prefill_stall_ms": math.inf}

MODELS = {4: SHALLOW, 2: dataclasses.replace(SHALLOW, num_kv_heads=2)}
"""By their number of KV heads; 2 are fewer than the four devices that compute."""

LENGTHS = (1, 9, 64, 80, 17)
"""Shorter and longer than a page and than a chunk, more of them than there are seats."""


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
    return {k: tokens_of(LLM(c, placement="collocated", **SETTINGS), prompts) for k, c in checkpoints.items()}


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0))
    return [output.outputs[0].token_ids for output in outputs]


EVERY = [
    (kv_heads, shards, workers, microbatches, overlap)
    for kv_heads, shards, workers, microbatches, overlap in itertools.product(
        (4, 2), (1, 2, 4), (1, 2, 4), (1, 2), ("on", "off")
    )
    if workers <= kv_heads
]
SOME = [
    (4, 4, 2, 2, "on"),
    (2, 4, 2, 1, "off"),
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
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plans: list[StepPlan] = []
    dispatch = DisaggregatedRunner.dispatch

    def spy(self: DisaggregatedRunner, plan: StepPlan) -> Any:
        plans.append(plan)
        return dispatch(self, plan)

    jobs: list[Job] = []

    def compile_and_keep(new: list[Job], report: Any) -> Compiled:
        jobs.extend(new)
        return compile_all(new, report)

    monkeypatch.setattr(DisaggregatedRunner, "dispatch", spy)
    monkeypatch.setattr("lamina_jax.engine.build.compile_all", compile_and_keep)
    with caplog.at_level("INFO", logger="lamina_jax"):
        llm = LLM(
            checkpoints[kv_heads],
            compute_devices=f"cpu:0-{shards - 1}",
            memory_devices=f"cpu:{shards}-{shards + workers - 1}",
            microbatches=microbatches,
            overlap=overlap,
            **SETTINGS,
        )
    assert tokens_of(llm, prompts) == expected[kv_heads]

    stats = llm.stats()
    assert stats["weight_devices"] == [f"cpu:{i}" for i in range(shards)]
    assert stats["page_devices"] == [f"cpu:{shards + i}" for i in range(workers)]
    assert stats["weight_bytes_per_device"] == weight_bytes(MODELS[kv_heads], shards)
    assert stats["compilations_after_ready"] == 0
    assert stats["pages_free"] == stats["pages_total"]
    size, messages = wire(plans, MODELS[kv_heads], shards, workers, together=overlap == "off")
    assert stats["wire_bytes_per_step"] * stats["steps"] == pytest.approx(size)
    assert stats["wire_messages_per_step"] * stats["steps"] == pytest.approx(messages)

    slices = {name: job.__self__.compiled for name, job in jobs if name.startswith("slice")}
    assert {name: collectives(compiled.as_text()) for name, compiled in slices.items()} == {
        name: moved(name, shards) for name in slices
    }

    lines = [str(piece) for piece in head_table(8, kv_heads, shards, workers).pieces]
    assert all(any(line in message for message in caplog.messages) for line in lines)


def wire(
    plans: list[StepPlan], config: ModelConfig, shards: int, workers: int, *, together: bool
) -> tuple[int, int]:
    """Bytes, (2 + 2/G) e d B L + 4 N B L whatever t and W, and messages: one each way per piece.

    With more shards than KV heads a message of q, k and v together brings the copies along.
    """
    pieces, kv_heads, head = max(shards, workers), config.num_kv_heads, 4 * config.head_dim
    q, lse, kv = config.num_heads * head, 4 * config.num_heads, 2 * kv_heads * head
    size = messages = 0
    for batch in (batch for plan in plans for batch in plan.microbatches):
        rows = config.num_layers * batch.bucket[0] * batch.bucket[1]
        both = batch.cached and together
        size += rows * kv * (max(1, shards // kv_heads) if both else 1)
        size += rows * (2 * q + lse) * batch.cached
        kv_messages = 0 if both else min(pieces, kv_heads)
        messages += config.num_layers * (kv_messages + 2 * pieces * batch.cached)
    return size, messages


def weight_bytes(config: ModelConfig, shards: int) -> int:
    """Of each device, float32: a share of every matrix, at least one KV head, and the norms whole."""
    hidden, size = config.hidden_size, config.head_dim
    matrices = 2 * config.num_heads * size * hidden + 3 * config.intermediate_size * hidden
    kv = 2 * max(1, config.num_kv_heads // shards) * size * hidden
    norms = 2 * hidden + 2 * size
    vocabulary = 2 * config.vocab_size * hidden // shards
    return 4 * (config.num_layers * (matrices // shards + kv + norms) + vocabulary + hidden)


def moved(name: str, shards: int) -> dict[str, int]:
    """What a slice may move between shards: one sum behind each of o_proj, down_proj and the embedding,
    and at the end the logits."""
    index, form = re.findall(r"slice (\d+) \((\w+)\)", name)[0]
    if shards == 1 or form == "rest":
        return {}
    sums = {"all-reduce": 1 if index == "0" else 2}
    return {**sums, "all-gather": 1} if form == "last" else sums


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
        LLM(checkpoints[4], compute_devices=compute, memory_devices=memory, **SETTINGS)
    for word in words:
        assert word in str(error.value)


@pytest.mark.slow
def test_an_axis_that_does_not_divide_stays_whole(tmp_path: Path) -> None:
    """A vocabulary and a feed-forward size that two devices cannot share; the default memory devices."""
    odd = dataclasses.replace(SHALLOW, num_layers=1, vocab_size=161, intermediate_size=47)
    folder = str(save_random(tmp_path, odd))
    expected = tokens_of(LLM(folder, placement="collocated", **SETTINGS), [[1, 2, 3]])
    llm = LLM(folder, compute_devices="cpu:0-1", **SETTINGS)
    assert tokens_of(llm, [[1, 2, 3]]) == expected
    assert not {"cpu:0", "cpu:1"} & set(llm.stats()["page_devices"])


def test_the_logits_are_gathered_not_the_table() -> None:
    """A tied table is both read by row and multiplied by; each device multiplies by its own rows."""
    devices = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    cut, whole = NamedSharding(devices, P("tensor")), NamedSharding(devices, P())

    def model(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return gathered_logits(matmul(table[tokens], table, contract=1), devices)

    table = jax.ShapeDtypeStruct((160, 32), jnp.bfloat16, sharding=cut)
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=whole)
    hlo = jax.jit(model, out_shardings=whole).lower(table, tokens).compile().as_text()
    assert re.findall(r"(\w+\[[\d,]*\])\S* all-gather", hlo) == ["f32[8,160]"]
