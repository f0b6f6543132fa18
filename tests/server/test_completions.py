"""`/v1/completions`: what a request may hold, what is refused by name, and what the answers look like."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_server import (
    MAX_MODEL_LEN,
    MODEL,
    FakeEngine,
    Running,
    continuation,
    running,
    sse,
    token_ids,
)

from lamina_jax.core import QueueFull, Request
from lamina_jax.engine.engine import Engine
from lamina_jax.server.protocol import MAX_CHOICES
from lamina_jax.server.refused_fields import REFUSED_IN_COMPLETIONS


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def test_the_answer_is_the_models_and_counts_its_tokens(fake: Running) -> None:
    body = fake.complete("hello", max_tokens=7).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "fake"
    assert body["choices"] == [
        {
            "index": 0,
            "text": continuation("hello", 7),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def test_max_tokens_is_sixteen_unless_said(fake: Running) -> None:
    for fields in ({}, {"max_tokens": None}):
        assert fake.complete("hello", **fields).json()["choices"][0]["text"] == continuation("hello", 16)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (token_ids("ab"), ["ab"]),
        ([token_ids("ab"), token_ids("c")], ["ab", "c"]),
        (["ab"] * 9, ["ab"] * 9),  # more than there are seats
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_form_of_prompt(fake: Running, prompt: Any, texts: list[str], stream: bool) -> None:
    response = fake.complete(prompt, max_tokens=5, stream=stream)
    bodies = sse(response.text)[:-1] if stream else [response.json()]
    found = [""] * len(texts)
    for choice in (choice for body in bodies for choice in body["choices"]):
        found[choice["index"]] += choice["text"]
    assert found == [continuation(text, 5) for text in texts]


def test_a_stream_tells_what_is_new_and_then_the_usage(fake: Running) -> None:
    response = fake.complete("hi", max_tokens=30, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = sse(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == continuation("hi", 30)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_a_stream_without_the_option_tells_no_usage(fake: Running) -> None:
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        chunks = sse(fake.complete("hi", stream=True, **options).text)[:-1]
        assert chunks
        assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_on_request(fake: Running, stream: bool) -> None:
    response = fake.complete([3, 4], max_tokens=6, stream=stream, return_token_ids=True)
    bodies = sse(response.text)[:-1] if stream else [response.json()]
    found = [token for body in bodies for token in body["choices"][0]["token_ids"]]
    assert found == MODEL.generate([3, 4], 6)


def test_stop_token_ids_end_the_text(fake: Running) -> None:
    tokens = MODEL.generate([3, 4], 6)
    stop = tokens[3]
    body = fake.complete([3, 4], max_tokens=6, stop_token_ids=[stop], return_token_ids=True).json()
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert len(choice["text"]) == tokens.index(stop)


def test_ignore_eos() -> None:
    end = MODEL.generate([3, 4], 3)[2]
    with running(FakeEngine(eos_token_ids=(end,)).build) as server:
        assert server.complete([3, 4], max_tokens=9).json()["choices"][0]["finish_reason"] == "stop"
        ignored = server.complete([3, 4], max_tokens=9, ignore_eos=True, return_token_ids=True).json()
        assert ignored["choices"][0]["token_ids"] == MODEL.generate([3, 4], 9)


@pytest.mark.parametrize("prompt", ["ab", token_ids("ab")])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(fake: Running, prompt: Any, stream: bool) -> None:
    for max_tokens in (0, 3):
        response = fake.complete([prompt, prompt], max_tokens=max_tokens, echo=True, stream=stream)
        bodies = sse(response.text)[:-1] if stream else [response.json()]
        found = ["", ""]
        for choice in (choice for body in bodies for choice in body["choices"]):
            found[choice["index"]] += choice["text"]
        assert found == ["ab" + continuation("ab", max_tokens)] * 2


def test_no_tokens(fake: Running) -> None:
    body = fake.complete("ab", max_tokens=0, return_token_ids=True).json()
    assert (body["choices"][0]["text"], body["choices"][0]["token_ids"]) == ("", [])
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_every_chunk_may_tell_the_usage(fake: Running) -> None:
    options = {"continuous_usage_stats": True}
    chunks = sse(fake.complete("ab", max_tokens=9, stream=True, stream_options=options).text)[:-1]
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == sorted(counted)
    assert counted[-1] == 9


def test_without_a_tokenizer_token_ids_still_work() -> None:
    with running(FakeEngine(with_tokenizer=False).build, load_tokenizer=lambda: None) as server:
        error = error_of(server.complete("text"), 400)
        assert error["param"] == "prompt"
        assert "tokenizer" in error["message"]
        body = server.complete([3, 4], max_tokens=6, return_token_ids=True).json()
        assert body["choices"][0]["token_ids"] == MODEL.generate([3, 4], 6)


@pytest.mark.parametrize("name", REFUSED_IN_COMPLETIONS)
def test_a_field_that_is_refused_may_ask_for_nothing(fake: Running, name: str) -> None:
    for harmless in (None, *REFUSED_IN_COMPLETIONS[name]):
        response = fake.complete("a", max_tokens=2, **{name: harmless})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == continuation("a", 2)
    for value in (7, {"a": [1]}, "{param}"):
        error = error_of(fake.complete("a", **{name: value}), 400)
        assert error["param"] == name
        assert name in error["message"]
        assert "not supported" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"max_tokns": 3}, "max_tokns", "unknown field"),
        ({"messages": []}, "messages", "unknown field"),
        ({"max_tokens": "3"}, "max_tokens", "integer"),
        ({"max_tokens": 3.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"n": 0}, "n", "1 .. 128"),
        ({"n": True}, "n", "integer"),
        ({"n": 3, "prompt": ["a"] * 400}, "n", "1024"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"n": 2, "best_of": 1}, "best_of", "send 2"),
        ({"min_tokens": 17}, "min_tokens", "0 .. 16"),
        ({"temperature": -0.1}, "temperature", "0 .. 100"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"min_p": 2}, "min_p", "0 .. 1"),
        ({"seed": 2**64}, "seed", "in -"),
        ({"presence_penalty": False}, "presence_penalty", "number"),
        ({"frequency_penalty": 3}, "frequency_penalty", "-2 .. 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"logprobs": 21}, "logprobs", "0 .. 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "0 .. 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "integer"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 .. 100"),
        ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias", "300"),
        ({"stop": 3}, "stop", "list"),
        ({"stop": ["a", 3]}, "stop.1", "string"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"stop": ["a"] * 65}, "stop", "64"),
        ({"echo": 0}, "echo", "boolean"),
        ({"model": 3}, "model", "string"),
        ({"model": None}, "model", "string"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"user": 3}, "user", "string"),
        ({"ignore_eos": 1}, "ignore_eos", "boolean"),
        ({"return_token_ids": 1}, "return_token_ids", "boolean"),
        ({"stop_token_ids": 3}, "stop_token_ids", "list"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids", "at least 0"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "1024"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids", "9223372036854775807"),
        ({"stop": "\ud800"}, "stop.0", "surrogates"),
        ({"max_tokens": 10**30}, "max_tokens", "9223372036854775807"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0", "integer"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "False",
        ),
        (
            {"stream": True, "stream_options": {"include_usage": "x"}},
            "stream_options.include_usage",
            "boolean",
        ),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": {"text": "a"}}, "prompt", "string"),
        ({"prompt": ["a", 3]}, "prompt", "string"),
        ({"prompt": ["a", [3]]}, "prompt", "string"),
        ({"prompt": [1, True]}, "prompt", "string"),
        ({"prompt": [1.0]}, "prompt", "string"),
        ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt", str(MAX_CHOICES)),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": [MODEL.vocab_size]}, "prompt", "vocabulary"),
        ({"prompt": [-1]}, "prompt", "vocabulary"),
        ({"prompt": [10**30]}, "prompt", "vocabulary"),
        ({"prompt": "\ud800"}, "prompt", ""),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    fake: Running, fields: dict[str, Any], param: str, word: str
) -> None:
    body = json.dumps({"model": "fake", "prompt": "a"} | fields)
    response = fake.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["param"] == param
    assert word in error["message"]


def test_fields_that_are_missing(fake: Running) -> None:
    for name, body in (("prompt", {"model": "fake"}), ("model", {"prompt": "a"})):
        error = error_of(fake.client.post("/v1/completions", json=body), 400)
        assert error["param"] == name
        assert "missing" in error["message"]


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, 1000])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(fake: Running, length: int, stream: bool) -> None:
    error = error_of(fake.complete(["a", "a" * length], stream=stream), 400)
    assert error["param"] == "prompt"
    assert error["code"] == "context_length_exceeded"
    assert str(length) in error["message"]
    assert fake.wait_for("/stats", lambda response: response.json()["pages_used"] == 0)


def test_a_queue_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeEngine().build) as server:
        assert server.complete("a").status_code == 200

        def submit(engine: Engine, request: Request) -> None:
            raise QueueFull("8 requests wait, and no more are taken: try again later")

        monkeypatch.setattr(Engine, "submit", submit)
        for stream in (False, True):
            response = server.complete("a", stream=stream)
            error = error_of(response, 429)
            assert (error["code"], error["param"]) == ("queue_full", None)
            assert int(response.headers["retry-after"]) > 0


def test_an_unknown_model(fake: Running) -> None:
    error = error_of(fake.complete(model="gpt"), 404)
    assert error["param"] == "model"
    assert error["code"] == "model_not_found"
    assert "'gpt'" in error["message"]
    assert "'fake'" in error["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "field", ['"\\ud800": 1', '"": 1', '"stream": true, "stream_options": {"\\ud800": 1}']
)
def test_a_field_whose_name_is_no_text(fake: Running, path: str, field: str) -> None:
    body = '{"model": "fake", "prompt": "a", ' + field + "}"
    response = fake.client.post(
        f"/v1/{path}", content=body.encode(), headers={"content-type": "application/json"}
    )
    assert "unknown field" in error_of(response, 400)["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"3", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object(fake: Running, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(fake.client.post("/v1/completions", content=content, headers=headers), 400)


def test_a_body_of_another_type_is_told_which_to_send(fake: Running) -> None:
    response = fake.client.post("/v1/completions", content=b'{"model": "fake", "prompt": "a"}')
    assert "application/json" in error_of(response, 400)["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(fake: Running, declared: bool) -> None:
    content = b'{"model": "fake", "prompt": "' + b"a" * (11 * 2**20) + b'"}'
    body: Any = content if declared else iter([content[: 2**23], content[2**23 :]])
    headers = {"content-type": "application/json"}
    error = error_of(fake.client.post("/v1/completions", content=body, headers=headers), 413)
    assert error["code"] == "body_too_large"


def test_routes_that_are_not_there(fake: Running) -> None:
    error_of(fake.client.get("/v1/nothing"), 404)
    error_of(fake.client.get("/v1/completions"), 405)


def test_the_model_is_listed(fake: Running) -> None:
    body = fake.client.get("/v1/models").json()
    (model,) = body["data"]
    assert body["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", MAX_MODEL_LEN)


def test_the_schema_knows_the_forms_of_a_prompt(fake: Running) -> None:
    schema = fake.client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert len(schema["properties"]["prompt"]["anyOf"]) == 4
    assert schema["additionalProperties"] is False
