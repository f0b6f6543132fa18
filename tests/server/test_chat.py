"""`/v1/chat/completions`: conversations in, messages out, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from fake_server import MAX_MODEL_LEN, FakeEngine, Running, continuation, conversation, running, sse
from test_completions import error_of

from lamina_jax.server.refused_fields import REFUSED_IN_CHAT


def test_an_answer(fake: Running) -> None:
    body = fake.chat("hello", max_completion_tokens=7).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    text = continuation(conversation("hello"), 7)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert body["usage"]["prompt_tokens"] == len(conversation("hello"))
    assert body["usage"]["completion_tokens"] == 7


def test_a_stream(fake: Running) -> None:
    options = {"include_usage": True}
    response = fake.chat("hello", "a", "b", max_tokens=9, stream=True, stream_options=options)
    *chunks, usage, done = sse(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == continuation(conversation("hello", "a", "b"), 9)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)


def test_content_as_parts_and_an_answer_sent_back(fake: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    spoken = fake.chat("one\ntwo", max_tokens=5)
    assert fake.chat(parts, max_tokens=5).json()["choices"] == spoken.json()["choices"]
    messages = [{"role": "user", "content": "a"}, spoken.json()["choices"][0]["message"]]
    body = {"model": "fake", "messages": messages, "max_tokens": 3}
    assert fake.client.post("/v1/chat/completions", json=body).status_code == 200


def test_the_prompt_may_end_without_the_beginning_of_an_answer(fake: Running) -> None:
    body = fake.chat("a", max_tokens=5, add_generation_prompt=False, chat_template_kwargs={"x": 1}).json()
    assert body["choices"][0]["message"]["content"] == continuation(conversation("a")[:-1], 5)


def test_an_answer_may_fill_the_context_unless_said(fake: Running) -> None:
    used = fake.chat("a").json()["usage"]
    assert used["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("name", REFUSED_IN_CHAT)
def test_a_field_that_is_refused_may_ask_for_nothing(fake: Running, name: str) -> None:
    for harmless in (None, *REFUSED_IN_CHAT[name]):
        assert fake.chat("a", max_tokens=1, **{name: harmless}).status_code == 200
    for value in ({"a": [1]}, "{param}"):
        error = error_of(fake.chat("a", **{name: value}), 400)
        assert error["param"] == name
        assert "not supported" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": ["a"]}, "messages.0", "dictionary"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "system"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, "messages[1].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "'image_url'",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "no tools"),
        ({"messages": [{"role": "user", "content": "é"}], "max_tokens": 0}, "max_tokens", "1"),
        ({"prompt": "a"}, "prompt", "unknown field"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens", "differ"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "0 .. 20"),
        ({"temperature": 101}, "temperature", "0 .. 100"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "dictionary"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    fake: Running, fields: dict[str, Any], param: str, word: str
) -> None:
    error = error_of(fake.chat("a", **fields), 400)
    assert error["param"] == param
    assert word in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_is_too_long(fake: Running, stream: bool) -> None:
    error = error_of(fake.chat("a" * 1000, stream=stream), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_an_unknown_model(fake: Running) -> None:
    assert error_of(fake.chat("a", model="gpt"), 404)["code"] == "model_not_found"


def test_a_checkpoint_without_a_template() -> None:
    with running(FakeEngine(with_tokenizer=False).build, load_tokenizer=lambda: None) as server:
        error = error_of(server.chat("a"), 400)
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]
