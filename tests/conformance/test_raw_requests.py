"""What harnesses and load generators send, and what they read from the answer.

Written after their sources: lm-evaluation-harness (local-completions), guidellm, `vllm bench serve` and
sglang's bench_serving.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import Running

PROMPT = "import os\nimport "
TOKENS = [[0, 10, 11, 12, 13, 14], [0, 20, 21, 22]]


def post(server: Running, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = server.client.post(path, json={"model": "bundled", **body}, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: Running, path: str, body: dict[str, Any], **headers: str) -> Iterator[dict[str, Any]]:
    """Line by line, as these clients read a stream; the last line is [DONE]."""
    body = {"model": "bundled", **body}
    with server.client.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        yield json.loads(line.removeprefix("data: "))


def test_lm_eval_scores_continuations(live: Running) -> None:
    """The continuation's log-probabilities, and whether greedy would have said it."""
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(live, "/v1/completions", {"prompt": TOKENS, **asked})
    for choice, tokens in zip(
        sorted(answer["choices"], key=lambda choice: choice["index"]), TOKENS, strict=True
    ):
        told, context = choice["logprobs"], len(tokens) - 2
        assert told["token_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(tokens) + 1
        continuation = told["token_logprobs"][context:-1]
        best = [max(top.values()) for top in told["top_logprobs"][context:-1]]
        assert len(continuation) == len(best) == 2
        assert sum(continuation) < 0
        assert all(value <= top for value, top in zip(continuation, best, strict=True))


def test_lm_eval_knows_a_greedy_continuation(live: Running) -> None:
    """What the model says by itself scores as greedy, and twice the same."""
    greedy = {"temperature": 0, "return_token_ids": True, "ignore_eos": True}
    said = post(live, "/v1/completions", {"prompt": TOKENS[0], "max_tokens": 3, **greedy})
    whole = TOKENS[0] + said["choices"][0]["token_ids"]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    first, second = (post(live, "/v1/completions", {"prompt": [whole], **asked}) for _ in range(2))
    told = first["choices"][0]["logprobs"]
    tops = [max(top.values()) for top in told["top_logprobs"][len(TOKENS[0]) : -1]]
    assert told["token_logprobs"][len(TOKENS[0]) : -1] == tops
    assert second["choices"][0]["logprobs"] == told


def test_lm_eval_generates(live: Running) -> None:
    asked = {"max_tokens": 8, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1234}
    answer = post(live, "/v1/completions", {"prompt": [PROMPT, "def f("], **asked})
    texts: list[str | None] = [None, None]
    for choice in answer["choices"]:
        texts[choice["index"]] = choice["text"]
    assert None not in texts
    assert not any("\n\n" in (text or "") for text in texts)


def test_lm_eval_looks_for_a_remote_tokenizer(live: Running) -> None:
    """A 404 says that there is none."""
    assert live.client.get("/tokenizer_info").status_code == 404


@pytest.mark.parametrize("chat", [False, True])
def test_vllm_bench_serve(live: Running, chat: bool) -> None:
    """It takes usage from the chunk that has no choices, and any other chunk for a token."""
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    if chat:
        content = [{"type": "text", "text": PROMPT}]
        body |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 6}
    else:
        body |= {"prompt": PROMPT, "max_tokens": 6, "repetition_penalty": 1.0, "logprobs": None}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    *chunks, last = events(live, path, body, **{"x-request-id": "bench-1"})
    assert all(chunk["choices"] for chunk in chunks)
    assert 1 <= len(chunks) <= 7
    if chat:
        assert all("delta" in chunk["choices"][0] for chunk in chunks)
    assert not last["choices"]
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens"] > 1


def test_guidellm(live: Running) -> None:
    """Usage in every chunk, content as a list of parts, `stop: null`."""
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": 5,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    chunks = list(events(live, "/v1/chat/completions", body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_guidellm_looks_whether_it_is_there(live: Running) -> None:
    assert live.client.get("/health").status_code == 200
    assert live.client.get("/v1/models").json()["data"][0]["id"] == "bundled"


def test_sglang_bench_serving(live: Running) -> None:
    """It reads `choices[0].text` of every chunk, so without the option none may be empty."""
    body = {
        "prompt": PROMPT,
        "temperature": 0.0,
        "best_of": 1,
        "max_tokens": 6,
        "stream": True,
        "ignore_eos": True,
    }
    chunks = list(events(live, "/v1/completions", body))
    whole = post(live, "/v1/completions", {**body, "stream": False})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 6
