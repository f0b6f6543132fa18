"""Attention workers behind real sockets and gRPC: the collocated model's tokens, the formula's bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, ConfigError, SamplingParams
from lamina_jax.core import StepPlan
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.exchange.frames import HEADER_BYTES
from lamina_jax.exchange.remote import RemoteExchange
from lamina_jax.models import ModelConfig
from lamina_jax.pool.partition import Partition
from lamina_jax.training.evaluation import load_plain
from lamina_jax.training.recall import recall_prompts
from lamina_jax.weights.hub import find_model

WINDOWED = dataclasses.replace(TINY, family="qwen2", num_layers=3, num_kv_heads=2, windows=(24, None, 24))
MODELS = {"full": dataclasses.replace(TINY, num_layers=2, num_heads=12, num_kv_heads=6), "windows": WINDOWED}
"""Six KV heads are shared evenly by 1, 2 and 3 workers."""

SETTINGS: dict[str, Any] = {**SMALL, "prefill_stall_ms": math.inf, "compute_devices": "cpu:0"}
LENGTHS = (1, 9, 64, 80, 17)
"""Shorter and longer than a page, a chunk and a window, more of them than there are seats."""

GREEDY = SamplingParams(max_tokens=12, temperature=0)
SEEDED = SamplingParams(max_tokens=12, temperature=0.9, seed=7, top_p=0.9)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        name: str(save_random(tmp_path_factory.mktemp("tiny"), config)) for name, config in MODELS.items()
    }


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, str]) -> dict[str, list[list[int]]]:
    """The collocated model's tokens."""
    return {
        name: tokens_of(LLM(folder, placement="collocated", **SETTINGS))
        for name, folder in checkpoints.items()
    }


def tokens_of(llm: LLM) -> list[list[int]]:
    """Greedy and seeded continuations of the same prompts, all at once."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in LENGTHS] * 2
    sampling = [GREEDY] * len(LENGTHS) + [SEEDED] * len(LENGTHS)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]


EVERY = [
    ("full", *case)
    for case in itertools.product(
        ("socket", "grpc", "jax"), ("heads", "requests", "tokens"), (1, 2, 3), (1, 2), ("on", "off")
    )
    if not (case[1] == "tokens" and case[4] == "off") and not (case[0] == "jax" and case[2] == 3)
] + [
    ("windows", exchange, partition, 2, 1, "on")
    for exchange in ("socket", "jax")
    for partition in ("heads", "requests", "tokens")
]
SOME = [
    ("full", "socket", "heads", 3, 2, "on"),
    ("full", "grpc", "requests", 3, 1, "off"),
    ("windows", "socket", "tokens", 2, 1, "on"),
]


def marks(case: tuple[Any, ...]) -> list[pytest.MarkDecorator]:
    if case in SOME:
        return []
    return [pytest.mark.hosts if case[1] == "jax" else pytest.mark.slow]


@pytest.mark.parametrize(
    ("model", "exchange", "partition", "count", "microbatches", "overlap"),
    [pytest.param(*case, marks=marks(case)) for case in EVERY],
)
def test_every_way_gives_the_collocated_tokens(
    checkpoints: dict[str, str],
    expected: dict[str, list[list[int]]],
    workers: Callable[..., str],
    model: str,
    exchange: Any,
    partition: Any,
    count: int,
    microbatches: Any,
    overlap: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[StepPlan] = []
    dispatch = DisaggregatedRunner.dispatch

    def spy(self: DisaggregatedRunner, plan: StepPlan) -> Any:
        plans.append(plan)
        return dispatch(self, plan)

    monkeypatch.setattr(DisaggregatedRunner, "dispatch", spy)
    with LLM(
        checkpoints[model],
        attention=workers(count, apart=exchange == "jax"),
        exchange=exchange,
        partition=partition,
        microbatches=microbatches,
        overlap=overlap,
        **SETTINGS,
    ) as llm:
        assert tokens_of(llm) == expected[model]

        stats = llm.stats()
        assert stats["compilations_after_ready"] == 0
        assert stats["pages_free"] == stats["pages_total"]
        to_all = exchange == "jax"
        sent = wire(plans, MODELS[model], llm, count, together=overlap == "off", to_all=to_all)
        found = [stats[f"wire_{what}_per_step"] * stats["steps"] for what in ("bytes", "messages")]
        assert found == pytest.approx(sent)
        check_sockets(llm, tensors=exchange != "jax")


def wire(
    plans: list[StepPlan], config: ModelConfig, llm: LLM, count: int, *, together: bool, to_all: bool = False
) -> tuple[int, int]:
    """Tensor bytes, (2 + 2/G) e d B L + 4 N B L by head and by request, q W + (k, v) + W (o + lse) by token,
    and messages: of each worker that takes part q, k and v, and an answer, the first two as one where
    they go together."""
    partition = llm.engine.runner.exchange.partition  # type: ignore[attr-defined]
    head = 4 * config.head_dim
    query, kv = config.num_heads * head, 2 * config.num_kv_heads * head
    answer = query + 4 * config.num_heads
    size = messages = 0
    for batch in (batch for plan in plans for batch in plan.microbatches):
        rows = batch.bucket[0] * batch.bucket[1]
        by_token = partition.kind == "tokens"
        to_all &= by_token  # static shapes: each worker gets k and v of all tokens
        alone = partition.kind == "requests" and batch.worker is not None
        takers = 1 if alone else count
        kept = kept_tokens(partition, batch) if by_token and not to_all else [rows] * takers
        tokens = sum(kept) if by_token else rows
        size += config.num_layers * (
            tokens * kv + batch.cached * (takers if by_token else 1) * rows * (query + answer)
        )
        kv_messages = 0 if together and batch.cached else sum(number > 0 for number in kept)
        messages += config.num_layers * (kv_messages + 2 * takers * batch.cached)
    return size, messages


def kept_tokens(partition: Partition, batch: Any) -> list[int]:
    return [len(partition.kept(told.slots)) for *_, told in partition.split(batch)]


def check_sockets(llm: LLM, *, tensors: bool) -> None:
    """What the channels counted is what the exchange did, and a header for each frame; or all of that but
    the tensors."""
    exchange = llm.engine.runner.exchange  # type: ignore[attr-defined]
    assert isinstance(exchange, RemoteExchange)
    channels = [worker.channel for worker in exchange.workers]
    frames = sum(channel.frames_sent + channel.frames_received for channel in channels)
    crossed = sum(channel.bytes_sent + channel.bytes_received for channel in channels)
    wire = exchange.wire
    hello = 16 * sum(channel.__class__.__name__ == "SocketChannel" for channel in channels)
    assert crossed == tensors * wire.tensor_bytes + wire.metadata_bytes + hello + HEADER_BYTES * frames


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["heads", "tokens"])
def test_workers_with_two_devices_each(
    checkpoints: dict[str, str],
    expected: dict[str, list[list[int]]],
    workers: Callable[..., str],
    partition: Any,
) -> None:
    name, count = ("windows", 2) if partition == "tokens" else ("full", 3)
    attention = workers(count, 2)
    with LLM(checkpoints[name], attention=attention, partition=partition, overlap="on", **SETTINGS) as llm:
        assert tokens_of(llm) == expected[name]


def test_workers_that_cannot_share_the_heads_are_refused(
    checkpoints: dict[str, str], workers: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError, match=r"4 attention workers.*6 KV heads.*1, 2, 3, 6 would"):
        LLM(checkpoints["full"], attention=workers(4), **SETTINGS)


@pytest.mark.slow
def test_bfloat16_is_what_one_process_computes(tmp_path: Path, workers: Callable[..., str]) -> None:
    """The same programs on the same buckets: not a bit differs."""
    folder = str(save_random(tmp_path, dataclasses.replace(WINDOWED, dtype="bfloat16")))
    settings = SETTINGS | {"overlap": "on"}
    local = logprobs_of(LLM(folder, memory_devices="cpu:1-2", **settings))
    with LLM(folder, attention=workers(2), **settings) as llm:
        np.testing.assert_array_equal(logprobs_of(llm), local)


@pytest.mark.slow
def test_a_narrower_wire(checkpoints: dict[str, str], workers: Callable[..., str]) -> None:
    """Half the bytes, lse apart; log-probabilities within the rounding of q, k, v and o to 8 bits."""
    exact = logprobs_of(LLM(checkpoints["windows"], placement="collocated", **SETTINGS))
    with LLM(checkpoints["windows"], attention=workers(1), wire_dtype="bfloat16", **SETTINGS) as llm:
        found = logprobs_of(llm)
        channel = llm.engine.runner.exchange.workers[0].channel  # type: ignore[attr-defined]
        assert channel.bytes_sent > 0
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=0.3)
    assert np.median(np.abs(found - exact)) < 0.05


def logprobs_of(llm: LLM) -> np.ndarray:
    """Of the tokens of a prompt of several pages and chunks."""
    prompt = np.random.default_rng(3).integers(0, TINY.vocab_size, size=70).tolist()
    output = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))[0]
    assert output.prompt_logprobs is not None
    following = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in following if entry is not None])


def test_a_request_longer_than_any_worker_holds(
    checkpoints: dict[str, str],
    expected: dict[str, list[list[int]]],
    workers: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By token: 48 tokens on each of two workers, and a prompt of 80."""
    caplog.set_level("INFO", "lamina_jax.engine.build")
    with LLM(checkpoints["full"], attention=workers(2), partition="tokens", num_pages=6, **SETTINGS) as llm:
        assert tokens_of(llm) == expected["full"]
        assert llm.stats()["pages_total"] == 12
    (table,) = [message for message in caplog.messages if message.startswith("memory budget")]
    columns = {row[0]: row[-1] for line in table.splitlines() if (row := line.rsplit(maxsplit=1))}
    assert next(size for name, size in columns.items() if name.startswith("temporaries")) != "0"


SHARDED = [
    ("full", 3, 3, 1, "heads", "on"),
    ("windows", 4, 2, 1, "heads", "off"),
    ("full", 3, 2, 1, "requests", "on"),
    ("windows", 4, 1, 2, "heads", "on"),
    ("windows", 4, 2, 1, "tokens", "on"),
    ("windows", 2, 2, 2, "requests", "off"),
]
"""Compute devices, workers, devices of each. Four hold copies of the windowed model's two KV heads."""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shards", "count", "devices", "partition", "overlap"), SHARDED)
def test_a_compute_mesh_of_several_devices(
    checkpoints: dict[str, str],
    expected: dict[str, list[list[int]]],
    workers: Callable[..., str],
    model: str,
    shards: int,
    count: int,
    devices: int,
    partition: Any,
    overlap: Any,
) -> None:
    settings = SETTINGS | {"compute_devices": f"cpu:0-{shards - 1}"}
    attention = workers(count, devices)
    with LLM(
        checkpoints[model], attention=attention, partition=partition, overlap=overlap, **settings
    ) as llm:
        assert tokens_of(llm) == expected[model]


@pytest.mark.slow
def test_recall_of_the_bundled_model_stays(workers: Callable[..., str]) -> None:
    """In its own bfloat16: token for token what one process answers, which test_bundled_end_to_end rates."""
    _, tokenizer = load_plain(find_model("bundled"))
    prompts = [prompt for prompt, _ in recall_prompts(77, 20, 512, tokenizer)]
    settings = {"max_model_len": 576, "max_prefill_tokens": 512, "prefill_stall_ms": math.inf}
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

    def answers(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    expected = answers(LLM("bundled", memory_devices="cpu:1-2", **settings))
    with LLM("bundled", attention=workers(2), **settings) as llm:
        assert answers(llm) == expected
