"""The official client of OpenAI against a live server: completions and chat, streamed and not."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from fake_server import Running

PROMPT = "import os\n"
GREEDY: dict[str, Any] = {"model": "bundled", "max_tokens": 12, "temperature": 0}
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is the code of wild moon?"}]},
]


def test_a_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    done = client.completions.create(prompt=PROMPT, **GREEDY)
    assert done.object == "text_completion"
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage is not None
    *parts, usage = client.completions.create(
        prompt=PROMPT, **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text != ""
    assert usage.usage == done.usage


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert done.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == done.choices[0].message.content != ""
    assert parts[-1].choices[0].finish_reason == done.choices[0].finish_reason
    second_turn = [*MESSAGES, done.choices[0].message, {"role": "user", "content": "Thanks."}]
    assert client.chat.completions.create(messages=second_turn, **GREEDY).choices


def test_several_prompts_as_token_ids_and_several_choices(client: openai.OpenAI) -> None:
    prompts = [[10, 11, 12], [20, 21]]
    done = client.completions.create(
        model="bundled", prompt=prompts, max_tokens=4, n=2, seed=7, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 16)


def test_a_seed_reproduces_and_its_choices_differ(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        done = client.chat.completions.create(
            model="bundled", messages=MESSAGES, max_tokens=12, n=2, seed=11, temperature=1.5
        )
        return [choice.message.content for choice in done.choices]

    first, second = ask()
    assert first != second
    assert ask() == [first, second]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = text[3:5]
    before = text[: text.index(stop)]
    done = client.completions.create(prompt=PROMPT, stop=stop, **GREEDY).choices[0]
    assert (done.text, done.finish_reason) == (before, "stop")
    assert done.model_extra == {"stop_reason": stop}
    parts = client.completions.create(prompt=PROMPT, stop=[stop], stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == before


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content
    for entry in whole.content:
        assert len(entry.top_logprobs) == 3
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)  # greedy takes the best
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **asked)
        if (told := chunk.choices[0].logprobs) is not None
        for entry in told.content or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.content]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_text_as_evaluation_harnesses_do(client: openai.OpenAI, max_tokens: int) -> None:
    """Their requests: token ids, `echo`, `logprobs=1`; the first entry is null."""
    token_ids = [0, 10, 11, 12, 13]
    asked = GREEDY | {"max_tokens": max_tokens, "seed": 1234}
    done = client.completions.create(prompt=token_ids, echo=True, logprobs=1, **asked)
    told = done.choices[0].logprobs
    assert told is not None
    length = len(token_ids) + max_tokens
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert [len(column or []) for column in (told.tokens, told.token_logprobs, told.text_offset)] == [
        length
    ] * 3
    assert [value is None for value in told.token_logprobs] == [True] + [False] * (length - 1)
    for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert value <= max(top.values()) <= 0
    assert "".join(told.tokens or []) == done.choices[0].text


def test_leaving_a_stream_early(client: openai.OpenAI, live: Running) -> None:
    with client.completions.create(**GREEDY | {"max_tokens": 100}, prompt=PROMPT, stream=True) as stream:
        next(iter(stream))
    live.wait_for("/stats", lambda response: response.json()["pages_used"] == 0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "bundled"
    assert model.model_extra == {"max_model_len": 128}


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(prompt="a " * 1000, **GREEDY)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=MESSAGES, tools=[{}], **GREEDY)  # type: ignore[list-item]
    assert refused.value.param == "tools"


def test_nothing_was_compiled_by_all_this(live: Running) -> None:
    assert live.client.get("/stats").json()["compilations_after_ready"] == 0
