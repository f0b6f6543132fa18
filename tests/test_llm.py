"""The library's front door: prompts in, vLLM-shaped outputs out, errors that name what is wrong."""

from __future__ import annotations

import pytest
from tiny_models import SMALL, TINY, save_random
from whole_outputs import gather

from lamina_jax import LLM, RequestOutput, SamplingParams
from lamina_jax.core import Request
from lamina_jax.models.hf_config import CheckpointError


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Without a tokenizer: the random checkpoint has none."""
    return LLM(str(save_random(tmp_path_factory.mktemp("tiny"))), **SMALL)


def one(llm: LLM, prompt: list[int], **params: object) -> RequestOutput:
    (output,) = llm.generate(prompt, SamplingParams(**({"temperature": 0} | params)))
    return output


def test_outputs_have_the_shape_that_vllm_users_know(llm: LLM) -> None:
    first, second = llm.generate(
        [[1, 2, 3], [4]],
        [SamplingParams(max_tokens=3, temperature=0), SamplingParams(max_tokens=5, temperature=0)],
    )
    assert first.prompt_token_ids == [1, 2, 3]
    assert first.finished
    assert (len(first.outputs[0].token_ids), len(second.outputs[0].token_ids)) == (3, 5)
    assert first.outputs[0].finish_reason == "length"
    assert first.outputs[0].text == ""


def test_stop_ids_end_a_text_and_are_named(llm: LLM) -> None:
    tokens = one(llm, [1, 2, 3], max_tokens=12).outputs[0].token_ids
    stop = tokens[4]
    end = tokens.index(stop)
    output = one(llm, [1, 2, 3], max_tokens=12, stop_token_ids=(stop,)).outputs[0]
    assert output.token_ids == tokens[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_a_continuation_ends_at_the_models_length(llm: LLM) -> None:
    output = one(llm, [7] * 60, max_tokens=1000).outputs[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == SMALL["max_model_len"] - 60


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty|at least one"),
        ([1] * 200, "max_model_len"),
        ([TINY.vocab_size], f"{TINY.vocab_size}"),
        ("text", "tokenizer.json"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_nothing_is_lost(
    llm: LLM, prompt: object, words: str
) -> None:
    expected = one(llm, [5, 6], max_tokens=4).outputs[0].token_ids
    with pytest.raises(ValueError, match=words):
        llm.generate([[5, 6], prompt], SamplingParams(max_tokens=4, temperature=0))  # type: ignore[list-item]
    stats = llm.stats()
    assert stats["pages_free"] == stats["pages_total"]
    assert stats["requests_running"] == stats["requests_waiting"] == 0
    assert one(llm, [5, 6], max_tokens=4).outputs[0].token_ids == expected


def test_an_abort_gives_the_pages_back_and_ends_the_output(llm: LLM) -> None:
    engine = llm.engine
    engine.submit(
        Request(
            request_id="a", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=50, temperature=0)
        )
    )
    outputs: dict[str, RequestOutput] = {}
    for _ in range(6):
        gather(outputs, engine.step())
    last = engine.abort("a")
    assert last is not None
    gather(outputs, [last])
    assert outputs["a"].outputs[0].finish_reason == "abort"
    assert outputs["a"].outputs[0].token_ids
    assert engine.abort("a") is None
    while engine.has_work:
        engine.step()
    engine.scheduler.check_idle()


def test_a_number_of_parameters_that_does_not_fit_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [SamplingParams(temperature=0)])


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="no/such/model"):
        LLM("no/such/model")
