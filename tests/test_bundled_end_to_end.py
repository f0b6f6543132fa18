"""The bundled model, served disaggregated: it still answers what it was told, and writes text."""

from __future__ import annotations

from typing import Any

import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.training.evaluation import evaluate_plain, load_plain
from lamina_jax.training.recall import recall_prompts
from lamina_jax.weights.hub import find_model

SEED = 77
LENGTH, NUM = 512, 40
Answered = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def prompts() -> Answered:
    _, tokenizer = load_plain(find_model("bundled"))
    return recall_prompts(SEED, NUM, LENGTH, tokenizer)


@pytest.fixture(scope="module")
def llm(prompts: Answered) -> LLM:
    # After the prompts, which load the plain model: compilations are counted for the whole process.
    return LLM("bundled", max_model_len=LENGTH + 64, max_prefill_tokens=LENGTH)


def test_recall_is_that_of_the_plain_model(llm: LLM, prompts: Answered) -> None:
    """An error in attention, paging, partition or merging would show as a wrong answer."""
    outputs = llm.generate(
        [prompt for prompt, _ in prompts], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    )
    right = [
        output.outputs[0].token_ids[: len(answer)] == answer
        for output, (_, answer) in zip(outputs, prompts, strict=True)
    ]
    stats = llm.stats()
    assert stats["placement"] == "disaggregated"
    assert not set(stats["weight_devices"]) & set(stats["page_devices"])
    assert stats["compilations_after_ready"] == 0
    assert stats["pages_free"] == stats["pages_total"]
    plain, _ = load_plain(find_model("bundled"))
    assert abs(sum(right) - round(NUM * evaluate_plain(plain, prompts))) <= 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_quantised_pages_recall_within_a_point() -> None:
    """Of 200 answers 2 may differ. In short chunks, so that most of a prompt is read from the pages."""
    _, tokenizer = load_plain(find_model("bundled"))
    prompts = recall_prompts(SEED, 200, LENGTH, tokenizer)
    bfloat16, *quantised = (_num_right(dtype, prompts) for dtype in ("bf16", "int8", "fp8"))
    assert bfloat16 >= 190
    assert max(abs(right - bfloat16) for right in quantised) <= 2, (bfloat16, quantised)


def _num_right(kv_dtype: Any, prompts: Answered) -> int:
    with LLM(
        "bundled", kv_dtype=kv_dtype, max_model_len=LENGTH + 64, max_prefill_tokens=128, num_pages=128
    ) as llm:
        outputs = llm.generate(
            [prompt for prompt, _ in prompts], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        )
    told = [output.outputs[0].token_ids for output in outputs]
    return sum(tokens[: len(answer)] == answer for tokens, (_, answer) in zip(told, prompts, strict=True))


def test_it_writes_text(llm: LLM) -> None:
    output = llm.generate("import os\n", SamplingParams(max_tokens=16, temperature=0)).pop().outputs[0]
    assert output.text.strip()
    assert (
        output.token_ids
        == llm.generate("import os\n", SamplingParams(max_tokens=16, temperature=0))[0].outputs[0].token_ids
    )
