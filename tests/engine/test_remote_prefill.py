"""Prompts prefilled on a host of its own, their KV pulled by workers: the collocated model's tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import TINY, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import AttendConfig, ConfigError, EngineConfig, SecurityConfig
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.exchange.channel import Frame
from lamina_jax.exchange.frames import Kind
from lamina_jax.prefill.prefiller import Prefiller
from lamina_jax.prefill.prompts import Prompt
from lamina_jax.prefill.server import PrefillServer
from lamina_jax.worker.server import WorkerServer
from lamina_jax.worker.session import Answer, Session

MODEL = dataclasses.replace(TINY, num_layers=2, num_kv_heads=2)
SETTINGS: dict[str, Any] = {
    "page_size": 8,
    "max_num_seqs": 3,
    "max_model_len": 160,
    "max_prefill_tokens": 20,
    "num_pages": 60,
    "microbatches": 1,
    "overlap": "on",
    "compute_devices": "cpu:0",
    "prefill_stall_ms": math.inf,
}
LENGTHS = (1, 2, 7, 8, 9, 10, 20, 21, 41, 150)
"""Around a page and a chunk, and nearly the longest."""

ALIGNED = (1, 21, 41, 141)
"""Whose last token is a chunk of its own when they are prefilled inline. In a chunk with others it reads
their KV before that is quantised, and after a prefill elsewhere when it is."""

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=0.9, seed=7, top_p=0.9, presence_penalty=0.5)

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny"), MODEL))


def tokens_of(llm: LLM, dtype: str) -> list[list[int]]:
    lengths = LENGTHS if dtype == "auto" else ALIGNED
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in lengths] * 2
    sampling = [GREEDY] * len(lengths) + [SEEDED] * len(lengths)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> dict[str, list[list[int]]]:
    return {
        dtype: tokens_of(LLM(checkpoint, placement="collocated", kv_dtype=dtype, **SETTINGS), dtype)
        for dtype in ("auto", "int8", "fp8")
    }


@pytest.fixture(scope="module")
def start_host(checkpoint: str) -> Iterator[Callable[..., str]]:
    """Starts a prefill host in this process; its address."""
    with ExitStack() as stack:

        def start(**changes: Any) -> str:
            config = EngineConfig(model=checkpoint, **(SETTINGS | changes))
            server = stack.enter_context(closing(PrefillServer(config, "127.0.0.1:0")))
            server.start()
            return f"127.0.0.1:{server.port}"

        yield start


CASES = [
    ("auto", *case) for case in itertools.product(("heads", "requests", "tokens"), (1, 2), ("auto", "jax"))
] + [("int8", "heads", 1, "auto"), ("fp8", "heads", 2, "auto")]


@pytest.mark.parametrize(("dtype", "partition", "count", "exchange"), CASES)
def test_every_partition_gives_the_collocated_tokens(
    checkpoint: str,
    expected: dict[str, list[list[int]]],
    start_host: Callable[..., str],
    workers: Callable[..., str],
    dtype: Any,
    partition: Any,
    count: int,
    exchange: Any,
) -> None:
    host = start_host(kv_dtype=dtype, compute_devices="cpu:4")
    with LLM(
        checkpoint,
        attention=workers(count, apart=exchange == "jax"),
        partition=partition,
        exchange=exchange,
        prefill=host,
        kv_dtype=dtype,
        **SETTINGS,
    ) as llm:
        assert tokens_of(llm, dtype) == expected[dtype]
        stats = llm.stats()
        assert stats["prefill_prompts"] == len(expected[dtype]) - 2  # two have one token
        assert stats["prefill_retries"] == stats["prefill_fallbacks"] == 0
        assert stats["compilations_after_ready"] == 0
        assert stats["pages_free"] == stats["pages_total"]


def arrays(pages: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for layer in pages for leaf in jax.tree.leaves(layer)]


def by_position(arrays: Sequence[np.ndarray], pages: Sequence[int], length: int) -> list[np.ndarray]:
    """Of each array [P, 2, K, p, ...] what a request keeps in its pages: [length, 2, K, ...]."""
    return [np.concatenate(np.moveaxis(array[list(pages)], 3, 1))[:length] for array in arrays]


def pages_of(llm: LLM, prompt: list[int]) -> list[int]:
    """Those that the engine gave the prompt, which has been answered."""
    given: list[int] = []
    pool = llm.engine.scheduler.pages
    allocate = pool.allocate

    def spy(owners: Sequence[int]) -> list[int]:
        pages = allocate(owners)
        given.extend(pages)
        return pages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "allocate", spy)
        llm.generate([prompt], dataclasses.replace(GREEDY, max_tokens=1))
    return given


class LateSession(Session):
    """The last k and v of a step come late, as when a network has lost them once."""

    def answers(self, frames: Iterable[Frame]) -> Iterator[Answer]:
        def late() -> Iterator[Frame]:
            for frame in frames:
                if frame.header.kind == Kind.KV and frame.header.layer == MODEL.num_layers - 1:
                    time.sleep(1.0)
                yield frame

        return super().answers(late())


@pytest.mark.parametrize("kind", [Session, LateSession])
def test_the_pages_hold_what_the_collocated_model_keeps(
    checkpoint: str, start_host: Callable[..., str], kind: type[Session]
) -> None:
    """Bit for bit, by token over two workers: what differs with quantised pages is computed after that.
    The request before, which had the same pages, leaves no trace in them."""
    prompt = np.random.default_rng(2).integers(0, TINY.vocab_size, size=142).tolist()
    kept, settings = len(prompt) - 1, SETTINGS | {"kv_dtype": "int8"}
    collocated = LLM(checkpoint, placement="collocated", **settings)
    pages, runner = pages_of(collocated, prompt), collocated.engine.runner
    assert isinstance(runner, CollocatedRunner)
    expected = by_position(arrays(runner.pages), pages, kept)

    with ExitStack() as stack:
        servers = []
        for _ in range(2):
            config = AttendConfig(listen="127.0.0.1:0", devices="cpu:1-1")
            server = stack.enter_context(closing(WorkerServer(config, SecurityConfig(), kind)))
            server.start()
            servers.append(server)
        llm = LLM(
            checkpoint,
            attention=",".join(f"127.0.0.1:{server.port}" for server in servers),
            partition="tokens",
            prefill=start_host(kv_dtype="int8"),
            **settings,
        )
        with llm:
            before = pages_of(llm, prompt[::-1])
            pages = pages_of(llm, prompt)
            assert set(pages) == set(before)
            assert llm.stats()["prefill_prompts"] == 2
            held: list[Any] = [server.leases.held[0]._session for server in servers]
            found = [arrays(session._shards[0].pages) for session in held]
            both = [np.concatenate(parts) for parts in zip(*found, strict=True)]
            for ours, theirs in zip(by_position(both, pages, kept), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


PROMPTS = [np.random.default_rng(i).integers(0, TINY.vocab_size, size=60).tolist() for i in range(6)]


@pytest.fixture(scope="module")
def answers(checkpoint: str) -> list[list[int]]:
    """The collocated model's, to `PROMPTS`."""
    outputs = LLM(checkpoint, placement="collocated", **SETTINGS).generate(PROMPTS, GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


def over(host: str, workers: Callable[..., str], checkpoint: str) -> LLM:
    return LLM(checkpoint, attention=workers(2), partition="tokens", prefill=host, **SETTINGS)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def test_a_host_that_fails_in_the_middle_of_a_prompt_costs_no_token(
    checkpoint: str,
    answers: list[list[int]],
    start_host: Callable[..., str],
    workers: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of two: its prompts go to the other one, and then here."""
    both = [start_host(), start_host()]
    failures = [2]
    chunks = Prefiller._chunks

    def failing(self: Prefiller, prompt: Prompt) -> Iterator[tuple[Any, int]]:
        for number, chunk in enumerate(chunks(self, prompt)):
            if number == 2 and failures[0]:
                failures[0] -= 1
                raise RuntimeError("out of tape")
            yield chunk

    with over(",".join(both), workers, checkpoint) as llm:
        monkeypatch.setattr(Prefiller, "_chunks", failing)
        assert tokens(llm) == answers
        stats = llm.stats()
        assert stats["prefill_hosts_up"] == 0
        assert stats["prefill_retries"] >= 2
        assert stats["prefill_fallbacks"] >= 1
        assert tokens(llm) == answers
        assert llm.stats()["pages_free"] == stats["pages_total"]


def test_a_host_that_comes_back_is_used_again(
    checkpoint: str, answers: list[list[int]], workers: Callable[..., str]
) -> None:
    config = EngineConfig(model=checkpoint, **SETTINGS)
    server = PrefillServer(config, "127.0.0.1:0")
    server.start()
    with over(f"127.0.0.1:{server.port}", workers, checkpoint) as llm:
        assert tokens(llm) == answers
        server.close()
        assert tokens(llm) == answers
        assert llm.stats()["prefill_hosts_up"] == 0
        with closing(PrefillServer(config, f"127.0.0.1:{server.port}")) as again:
            again.start()
            assert until(lambda: llm.stats()["prefill_hosts_up"] == 1)
            before = llm.stats()["prefill_prompts"]
            assert tokens(llm) == answers
            assert llm.stats()["prefill_prompts"] == before + len(PROMPTS)


def test_whatever_is_aborted_leaves_nothing_behind(
    checkpoint: str, answers: list[list[int]], workers: Callable[..., str]
) -> None:
    rng = np.random.default_rng(1)
    with closing(PrefillServer(EngineConfig(model=checkpoint, **SETTINGS), "127.0.0.1:0")) as server:
        server.start()
        with over(f"127.0.0.1:{server.port}", workers, checkpoint) as llm:
            engine = llm.engine
            for i in range(60):
                prompt = PROMPTS[i % len(PROMPTS)][: int(rng.integers(2, 60))]
                engine.submit(engine.request(f"r{i}", prompt, GREEDY))
                for _ in range(int(rng.integers(0, 4))):
                    engine.step()
                engine.abort(f"r{int(rng.integers(max(0, i - 4), i + 1))}")
            while engine.has_work:
                engine.step()
            engine.scheduler.check_idle()
            assert server.prompts is not None
            assert until(lambda: server.prompts.held == 0)
            assert tokens(llm) == answers
            assert llm.stats()["prefill_fallbacks"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "int8"}, "another dtype or kv_dtype"),
        ({"max_model_len": 100}, "give both the same max_model_len"),
    ],
)
def test_a_host_that_does_not_fit_is_refused(
    checkpoint: str,
    start_host: Callable[..., str],
    workers: Callable[..., str],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        over(start_host(**changes), workers, checkpoint)
