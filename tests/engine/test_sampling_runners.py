"""Sampling in whole engines: the same tokens on both placements, in any batch, after any restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.core import CompletionOutput, RequestOutput

MIXED = [
    SamplingParams(max_tokens=12, temperature=0.8, seed=1, top_k=20),
    SamplingParams(max_tokens=12, temperature=1.5, seed=2, top_p=0.9, min_p=0.01, logprobs=3),
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(
        max_tokens=12, seed=2**64 - 1, presence_penalty=1, repetition_penalty=1.3, prompt_logprobs=2
    ),
    SamplingParams(max_tokens=12, seed=5, frequency_penalty=2, logit_bias={3: 2.0}, n=2),
    SamplingParams(max_tokens=12, temperature=0, logprobs=0, prompt_logprobs=0),
]
"""Plain rows beside such as need every program."""

LENGTHS = (3, 40, 9, 70, 17, 90)
"""Prompts shorter and longer than a page and than a chunk of 64."""

PLACES: dict[str, dict[str, Any]] = {
    "collocated": {"placement": "collocated"},
    "disaggregated": {"memory_devices": "cpu:1-2", "microbatches": 2, "overlap": "on"},
    "tensor parallel": {"compute_devices": "cpu:0-1", "memory_devices": "cpu:2-3"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Weights that leave several tokens a chance, so that seeds matter.
    return str(save_random(tmp_path_factory.mktemp("tiny"), std=0.25))


@pytest.fixture(scope="module")
def llms(checkpoint: str) -> dict[str, LLM]:
    longer = SMALL | {"max_model_len": 128}
    return {name: LLM(checkpoint, **{**longer, **place}) for name, place in PLACES.items()}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, TINY.vocab_size, size=length).tolist() for length in LENGTHS]


@pytest.fixture(autouse=True)
def nothing_is_compiled(llms: dict[str, LLM]) -> Iterator[None]:
    def count() -> list[int]:  # the engines were built one after the other: they count each other's
        return [llm.stats()["compilations_after_ready"] for llm in llms.values()]

    before = count()
    yield
    assert count() == before


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def test_placements_batches_and_restarts_agree(llms: dict[str, LLM], prompts: list[list[int]]) -> None:
    outputs = {name: llm.generate(prompts, MIXED) for name, llm in llms.items()}
    expected = tokens_of(outputs["collocated"])
    for name, llm in llms.items():
        assert tokens_of(outputs[name]) == expected, name
        assert llm.stats()["pages_free"] == llm.stats()["pages_total"]
        for mine, theirs in zip(outputs[name], outputs["collocated"], strict=True):
            close(mine, theirs)
    alone = [llms["disaggregated"].generate([p], s)[0] for p, s in zip(prompts, MIXED, strict=True)]
    assert tokens_of(alone) == expected
    backwards = llms["disaggregated"].generate(prompts[::-1], MIXED[::-1])
    assert tokens_of(backwards)[::-1] == expected
    first, second = expected[4]
    assert first != second


def close(mine: RequestOutput, theirs: RequestOutput) -> None:
    """The same log-probabilities of the same tokens, to rounding."""
    pairs = [(mine.prompt_logprobs, theirs.prompt_logprobs)]
    pairs += [(a.logprobs, b.logprobs) for a, b in zip(mine.outputs, theirs.outputs, strict=True)]
    for found, expected in pairs:
        assert (found is None) == (expected is None)
        for one, other in zip(found or [], expected or [], strict=True):
            assert (one or {}).keys() == (other or {}).keys()
            for token in one or {}:
                assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)


@pytest.mark.parametrize("name", PLACES)
def test_logprobs_of_a_prompt_are_those_of_its_generation(
    llms: dict[str, LLM], prompts: list[list[int]], name: str
) -> None:
    """What decoding says of its tokens, chunked prefill says of them in a prompt."""
    prompt, llm = prompts[1], llms[name]
    params = SamplingParams(max_tokens=60, seed=7, logprobs=20)
    generated = llm.generate([prompt], params)[0].outputs[0]
    again = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20)
    told = llm.generate([prompt + generated.token_ids], again)[0].prompt_logprobs
    assert told is not None
    assert generated.logprobs is not None
    assert told[0] is None
    assert len(told) == len(prompt) + 60
    for before, after, token in zip(
        generated.logprobs, told[len(prompt) :], generated.token_ids, strict=True
    ):
        assert after is not None
        assert after[token].logprob == pytest.approx(before[token].logprob, abs=1e-4)
        assert after[token].rank == before[token].rank
        assert len(before) in (20, 21)
        assert sum(np.exp(entry.logprob) for entry in before.values()) < 1 + 1e-5


def by_hand(choice: CompletionOutput, presence: float, frequency: float) -> list[int]:
    """Each token that a greedy choice should be, from the raw log-probabilities and the tokens before."""
    assert choice.logprobs is not None
    expected = []
    for place, entries in enumerate(choice.logprobs):
        counts = Counter(choice.token_ids[:place])
        edited = {
            t: e.logprob - (presence + frequency * counts[t]) * (t in counts) for t, e in entries.items()
        }
        expected.append(max(edited, key=edited.__getitem__))
    return expected


@pytest.mark.parametrize("name", PLACES)
def test_penalties_see_the_token_that_is_still_on_the_device(
    llms: dict[str, LLM], prompts: list[list[int]], name: str
) -> None:
    params = SamplingParams(
        max_tokens=40, temperature=0, presence_penalty=1.5, frequency_penalty=1.5, logprobs=20
    )
    plain = llms[name].generate(prompts[:4], SamplingParams(max_tokens=40, temperature=0))
    for output, unpunished in zip(llms[name].generate(prompts[:4], params), plain, strict=True):
        choice = output.outputs[0]
        assert choice.token_ids == by_hand(choice, 1.5, 1.5)
        assert choice.token_ids != unpunished.outputs[0].token_ids


def test_end_ids_wait_for_min_tokens(llms: dict[str, LLM]) -> None:
    ends = tuple(range(20))
    params = SamplingParams(max_tokens=30, min_tokens=9, seed=3, stop_token_ids=ends, logit_bias={5: 100.0})
    for llm in llms.values():
        tokens = llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
        assert not set(tokens[:9]) & set(ends)
        assert tokens[9:] == [5]
