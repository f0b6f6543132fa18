"""The memory budget: it adds up, names the flag to change, and what it takes of XLA's word holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SMALL, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.compilation import Footprint
from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.engine.budget import Budget, Needs, Room, Share, plan_budget, shares_of, wanted_pages
from lamina_jax.engine.limits import Limits
from lamina_jax.ops import NO_WINDOW
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.shard import AttentionKind, AttentionShard

LIMITS = Limits(
    max_model_len=100,
    max_num_seqs=4,
    max_prefill_tokens=50,
    microbatches=1,
    overlap=False,
    page_size=10,
    max_waiting=8,
)
MIB = 2**20


def plan(needs: Needs, size: int, limits: Limits = LIMITS, fraction: float = 0.5, **settings: Any) -> Budget:
    return plan_budget({"host": Room(size, fraction)}, [("host", needs)], EngineConfig(**settings), limits)


def test_as_many_pages_as_fit() -> None:
    """Of 1000 bytes half; 100 are for weights, 90 for programs: 310 for pages of 13."""
    assert plan(Needs(100, 40, 50, 13), 1000).num_pages == 310 // 13
    assert plan(Needs(100, 40, 50, 13), 100_000).num_pages == wanted_pages(LIMITS) == 4 * 10


def test_the_smallest_room_decides() -> None:
    rooms = {"a": Room(1000, 1.0), "b": Room(200, 1.0), "compute": Room(100, 1.0)}
    shares = [("a", Needs(page=10)), ("b", Needs(page=10)), ("compute", Needs(weights=90))]
    assert plan_budget(rooms, shares, EngineConfig(), LIMITS).num_pages == 20


def test_devices_of_one_room_share_it() -> None:
    cpus = jax.devices()[:2]
    needs = shares_of(cpus, Footprint(temporaries=7, results=3), weights=5, page=2, limits=LIMITS, ahead=4)
    # A CPU device may run a decode and a prefill program at once.
    assert needs == [("host", Needs(weights=5, temporaries=14, in_flight=12, page=2))] * 2
    budget = plan_budget({"host": Room(10_000, 0.5)}, needs, EngineConfig(), LIMITS)
    assert budget.needs == {"host": Needs(10, 28, 24, 4)}


@given(
    st.lists(st.builds(Needs, *[st.integers(0, 10**11)] * 3, st.integers(1, 10**6)), min_size=1, max_size=5),
    st.floats(0.01, 1),
)
def test_the_printed_table_adds_up(needs: list[Needs], fraction: float) -> None:
    rooms = {
        f"room {i}": Room(int((need.fixed + 10**9) / fraction), fraction) for i, need in enumerate(needs)
    }
    shares = list(zip(rooms, needs, strict=True))
    table = plan_budget(rooms, shares, EngineConfig(), LIMITS).table()
    rows = {line[:40].split("  ")[0]: figures(line) for line in table.splitlines()}
    parts = [rows[name] for name in rows if name not in ("memory budget, bytes", "memory", "memory_fraction")]
    usable, *others = parts
    assert len(others) == 5
    assert [sum(column) for column in zip(*others, strict=True)] == usable


def figures(line: str) -> list[int]:
    return [
        int(cell.replace(",", "")) for cell in re.split(r"\s{2,}", line)[1:] if re.fullmatch(r"[\d,]+", cell)
    ]


@pytest.mark.parametrize(
    ("needs", "settings", "words"),
    [
        (Needs(weights=11 * MIB, page=1), {}, ["weights 11.0 MiB", "smaller model"]),
        (Needs(MIB, MIB, MIB, MIB), {}, ["lower --max-model-len=100", "pages for one request", "10.0 MiB"]),
        (
            Needs(MIB, 9 * MIB, 0, 10),
            {},
            ["--max-prefill-tokens=50", "--max-num-seqs=4", "temporaries 9.0 MiB"],
        ),
        (Needs(MIB, 0, 9 * MIB, 10), {}, ["--max-prefill-tokens=50", "in flight 9.0 MiB"]),
        (Needs(MIB, 0, 0, MIB), {"num_pages": 10}, ["lower --num-pages", "--num-pages=10", "10.0 MiB"]),
    ],
)
def test_the_error_names_the_flag_and_the_figures(
    needs: Needs, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        plan(needs, 20 * MIB - 2, **settings)
    for word in [*words, "host", "--memory-fraction=0.5", "raise --memory-fraction"]:
        assert word in str(error.value)


@pytest.mark.parametrize(("partition", "pages"), [("heads", 40), ("requests", 20), ("tokens", 4 * 5)])
def test_pages_are_counted_of_each_part(partition: Any, pages: int) -> None:
    limits = Limits(**{**vars(LIMITS), "partition": partition, "workers": 1 if partition == "heads" else 2})
    assert wanted_pages(limits) == pages


@pytest.mark.parametrize("overlap", [False, True])
def test_what_attention_needs_does_not_grow_with_the_pool(overlap: bool) -> None:
    def footprint(num_pages: int) -> Footprint:
        shard = AttentionShard(geometry(num_pages), jax.devices()[1], [NO_WINDOW], [AttentionKind(1.0, None)])
        for _, compile_one in shard.jobs((2, 16), 3, cached=True, overlap=overlap):
            compile_one()
        return shard.footprint

    few, many = footprint(6), footprint(6000)
    assert few == many
    assert few.temporaries > 0
    # Behind its results stand q, o in float32 and lse; and k, v.
    heads = 2 * 16 * (2 * 4 * 8 + 4) * 4
    assert few.results >= heads


def geometry(num_pages: int) -> CacheGeometry:
    return CacheGeometry(
        num_layers=1,
        num_pages=num_pages,
        page_size=8,
        num_kv_heads=2,
        num_heads=4,
        head_dim=8,
        dtype="float32",
        wire_dtype="float32",
    )


@pytest.mark.slow
def test_with_less_memory_there_are_fewer_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of both placements: the same tokens from a pool of a third, whose programs were compiled again."""
    caplog.set_level("INFO", logger="lamina_jax")
    folder = str(save_random(tmp_path))

    def tight(
        rooms: Mapping[str, Room], shares: Sequence[Share], config: EngineConfig, limits: Limits
    ) -> Budget:
        (needs,) = plan_budget(rooms, shares, config, limits).needs.values()
        room = Room(needs.fixed + 16 * needs.page, 1.0)
        return plan_budget({"host": room}, shares, config, limits)

    def tokens(placement: str) -> list[Any]:
        with LLM(folder, placement=placement, **SMALL) as llm:  # type: ignore[arg-type]
            outputs = llm.generate([[1, 2, 3] * 5] * 3, SamplingParams(max_tokens=8, temperature=0))
            stats = llm.stats()
        assert stats["compilations_after_ready"] == 0
        assert stats["pages_free"] == stats["pages_total"]
        return [stats["pages_total"], *[output.outputs[0].token_ids for output in outputs]]

    wide = tokens("collocated")
    monkeypatch.setattr("lamina_jax.engine.build.plan_budget", tight)
    for placement in ("collocated", "disaggregated"):
        pages, *found = tokens(placement)
        assert pages == 16 < wide[0]
        assert found == wide[1:]
    assert "KV cache: 16 pages of 8 tokens" in caplog.text
