"""What a GPU's kernel plans is planned once in a step, for all layers with one window. Interpreted here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.ops import NO_WINDOW
from lamina_jax.pool import shard as shards
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.metadata import StepMetadata
from lamina_jax.pool.shard import AttentionKind, AttentionShard
from pallas_kernels import paged_attention, split_plan

GEOMETRY = CacheGeometry(
    num_layers=3,
    num_pages=8,
    page_size=8,
    num_kv_heads=2,
    num_heads=4,
    head_dim=8,
    dtype="float32",
    wire_dtype="float32",
)
WINDOWS = [NO_WINDOW, 6, NO_WINDOW]
BUCKET, WIDTH = (2, 1), 4


@pytest.fixture
def interpreted_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards take the kernel of a GPU, interpreted."""
    monkeypatch.setattr(shards, "kernel_platform", lambda *_, **__: "gpu")
    monkeypatch.setattr(shards, "paged_attention", partial(paged_attention, interpret=True))
    monkeypatch.setattr(shards, "split_plan", partial(split_plan, interpret=True))


def told() -> StepMetadata:
    """Two requests with 20 and 9 cached tokens."""
    tables = np.array([[3, 1, 5, 0], [2, 7, 0, 0]], np.int32)
    lens = np.array([20, 9], np.int32)
    places = np.tile(np.arange(WIDTH, dtype=np.int32), (2, 1))
    return StepMetadata(tables, lens, places, lens[:, None], np.array([[44], [57]], np.int32))


def answers(*, overlap: bool) -> tuple[list[str], list[np.ndarray], AttentionShard]:
    """The programs of a shard, and what each layer answers in one step."""
    shard = AttentionShard(GEOMETRY, jax.devices()[1], WINDOWS, [AttentionKind(0.3, None)] * 3)
    shard.hold()
    rng = np.random.default_rng(0)
    for layer, pages in enumerate(shard.pages):
        filled = rng.standard_normal(pages.shape).astype(np.float32)
        shard.pages[layer] = jax.device_put(filled, shard.device)
    jobs = list(shard.jobs(BUCKET, WIDTH, cached=True, overlap=overlap))
    for _, compile_one in jobs:
        compile_one()
    begun, attended = shard.begin(told()), []
    for layer in range(3):
        qkv = rng.standard_normal((*BUCKET, 8, 8)).astype(np.float32)
        if overlap:
            attended += shard.attend(layer, begun, (qkv[:, :, :4],))
        else:
            attended += shard.append_and_attend(layer, begun, (qkv,))
    return [name.split()[0] for name, _ in jobs], list(map(np.asarray, attended)), shard


@pytest.mark.usefixtures("interpreted_gpu")
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers_share_plans_and_answer_the_same(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    names, planned, shard = answers(overlap=overlap)
    assert names == (["append", "plan", "attend"] if overlap else ["plan", "both"])
    plans = shard.begin(told()).plans
    assert set(plans) == {NO_WINDOW, 6}

    monkeypatch.setattr(shards, "kernel_platform", lambda *_, **__: "cpu")
    monkeypatch.setattr(shards, "paged_attention", paged_attention)
    names, unplanned, shard = answers(overlap=overlap)
    assert "plan" not in names
    assert shard.begin(told()).plans == {}
    for ours, its in zip(planned, unplanned, strict=True):
        np.testing.assert_allclose(ours, its, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_gives_the_tokens_of_xlas_kernels(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = str(save_random(tmp_path, TINY))

    def tokens() -> list[list[int]]:
        with LLM(checkpoint, **SMALL, overlap="on", memory_devices="cpu:1", cpu_kernels="xla") as llm:
            outputs = llm.generate([[1, 2, 3] * 9, [5, 7] * 4], SamplingParams(max_tokens=8, temperature=0))
            assert llm.stats()["compilations_after_ready"] == 0
        return [output.outputs[0].token_ids for output in outputs]

    expected = tokens()
    request.getfixturevalue("interpreted_gpu")
    assert tokens() == expected
