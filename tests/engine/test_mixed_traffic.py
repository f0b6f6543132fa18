"""Requests of all kinds and lengths arrive at random while others decode: each gets the tokens that it
gets alone, from a collocated model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random
from whole_outputs import gather

from lamina_jax import LLM, SamplingParams
from lamina_jax.core import RequestOutput

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": -1, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"temperature": 1.2, "seed": 2**63, "frequency_penalty": 1.0, "logit_bias": {7: 5.0, 8: -100.0}},
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 11, "n": 3, "min_tokens": 4, "stop_token_ids": range(0, 160, 2)},
]
PAGES = {"heads": 14, "requests": 12, "tokens": 6}
"""Of each worker: hardly more than the longest request needs."""

LENGTHS = (1, 7, 8, 21, 40, 63, 17)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def cases() -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(5)
    kinds = rng.permutation(2 * len(KINDS)) % len(KINDS)
    return [
        (
            rng.integers(0, TINY.vocab_size, size=LENGTHS[case % len(LENGTHS)]).tolist(),
            SamplingParams(max_tokens=int(rng.integers(20, 50)), **KINDS[kind])
            if "min_tokens" not in KINDS[kind]
            else SamplingParams(max_tokens=20, **KINDS[kind]),
        )
        for case, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: str, cases: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    """What the collocated model gives each of them on its own, prefilled in one chunk."""
    llm = LLM(checkpoint, placement="collocated", **(SMALL | {"max_prefill_tokens": 64}))
    return [llm.generate([prompt], params)[0] for prompt, params in cases]


@pytest.mark.parametrize(
    ("partition", "remote", "microbatches", "overlap"),
    [
        pytest.param("heads", 0, 2, "on", marks=pytest.mark.slow),
        ("tokens", 0, 1, "on"),
        ("requests", 2, 1, "on"),
        pytest.param("heads", 0, 1, "off", marks=pytest.mark.slow),
        pytest.param("requests", 0, 2, "off", marks=pytest.mark.slow),
        pytest.param("heads", 2, 2, "on", marks=pytest.mark.slow),
        pytest.param("tokens", 3, 2, "on", marks=pytest.mark.slow),
    ],
)
def test_arrivals_at_random_change_nothing(
    checkpoint: str,
    cases: list[tuple[list[int], SamplingParams]],
    alone: list[RequestOutput],
    workers: Callable[..., str],
    partition: Any,
    remote: int,
    microbatches: Any,
    overlap: Any,
) -> None:
    """`remote`: how many attention workers; 0: two memory devices of this process. Pages run out."""
    there = {"attention": workers(remote)} if remote else {"memory_devices": "cpu:1-2"}
    settings = {"partition": partition, "microbatches": microbatches, "overlap": overlap}
    llm = LLM(checkpoint, num_pages=PAGES[partition], **settings, **there, **SMALL)
    seed = remote + microbatches
    engine, rng = llm.engine, np.random.default_rng(seed)
    waiting = list(rng.permutation(len(cases)))
    outputs: dict[str, RequestOutput] = {}
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            case = int(waiting.pop())
            engine.submit(engine.request(str(case), *cases[case]))
        gather(outputs, engine.step())
    for case, expected in enumerate(alone):
        output = outputs[str(case)]
        for mine, theirs in zip(output.outputs, expected.outputs, strict=True):
            assert mine.token_ids == theirs.token_ids, cases[case]
            assert mine.finish_reason == theirs.finish_reason
            _close(mine.logprobs, theirs.logprobs)
        _close(output.prompt_logprobs, expected.prompt_logprobs)
    stats = llm.stats()
    assert stats["compilations_after_ready"] == 0
    assert stats["preemptions"] > 0
    assert stats["pages_free"] == stats["pages_total"]
    llm.close()


def _close(mine: list[Any] | None, theirs: list[Any] | None) -> None:
    if mine is None or theirs is None:
        assert mine is theirs
        return
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        if one is None:
            assert other is None
            continue
        shared = one.keys() & other.keys()
        assert next(iter(one)) in shared
        assert {t: one[t].logprob for t in shared} == pytest.approx(
            {t: other[t].logprob for t in shared}, abs=1e-3
        )


def test_log_probabilities_are_those_of_the_model(
    cases: list[tuple[list[int], SamplingParams]], alone: list[RequestOutput]
) -> None:
    """They come with every token and with every prompt token but the first."""
    told = [(case, output) for case, output in zip(cases, alone, strict=True) if case[1].logprobs is not None]
    assert told
    for (prompt, params), output in told:
        (choice,) = output.outputs
        assert choice.logprobs is not None
        assert output.prompt_logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
            assert entry[token].rank == 1, "greedy"
            assert len(entry) == params.logprobs
            assert all(found.logprob <= entry[token].logprob for found in entry.values())
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            assert token in entry
