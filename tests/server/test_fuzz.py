"""Whatever a client sends, it gets a right answer or an error of its own, and nothing goes on running."""

from __future__ import annotations

import json
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from bodies import PATHS, any_request, right
from fake_server import (
    DEADLINE,
    FakeEngine,
    GatedRunner,
    Running,
    continuation,
    pages_are_back,
    running,
    sse,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina_jax.core import MAX_LOGPROBS, Sampled, StepPlan, TokenLogprobs

# The server draws its seeds in other threads while hypothesis draws its examples.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

FEW, MANY = 50, 1_000
MOST_BYTES = 20_000
"""Of an error: it repeats no more than a part of what was sent."""


class TellingRunner(GatedRunner):
    """A fake runner that makes up log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self._plans: deque[StepPlan] = deque()

    def dispatch(self, plan: StepPlan) -> list[np.ndarray]:
        self._plans.append(plan)
        return super().dispatch(plan)

    def read(self, step: list[np.ndarray]) -> list[Sampled]:
        plan = self._plans.popleft()
        return [
            replace(
                sampled,
                logprobs=made_up(len(part.tokens)),
                prompt_logprobs=None if part.prompt_targets is None else made_up(part.tokens.size),
            )
            for sampled, part in zip(super().read(step), plan.microbatches, strict=True)
        ]


def made_up(rows: int) -> TokenLogprobs:
    """Of so many tokens; one can be impossible, as where a prompt says what the model never would."""
    top_ids = np.tile(np.arange(MAX_LOGPROBS, dtype=np.int32), (rows, 1))
    top = np.tile(-np.arange(MAX_LOGPROBS, dtype=np.float32), (rows, 1))
    chosen = np.full(rows, -np.inf, np.float32)
    return TokenLogprobs(chosen=chosen, ranks=np.full(rows, 7, np.int32), top_ids=top_ids, top=top)


@pytest.fixture(scope="module")
def telling() -> Iterator[Running]:
    with running(FakeEngine(TellingRunner()).build) as server:
        yield server


examples = pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=[pytest.mark.load, pytest.mark.timeout(900)])]
)


def on_many(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check so many examples."""
    without = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given]
    settings(max_examples=count, suppress_health_check=without)(given(strategy)(check))()


def assert_answered(response: httpx.Response) -> None:
    """With what was asked for, or with an error in OpenAI's shape."""
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert sse(response.text)[-1] == "[DONE]"
        else:
            assert response.json()["choices"]
        return
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(response.content) < MOST_BYTES


def assert_unharmed(server: Running) -> None:
    server.wait_for("/stats", pages_are_back)
    assert server.complete("abc", max_tokens=9).json()["choices"][0]["text"] == continuation("abc", 9)


@examples
def test_any_body(telling: Running, examples: int) -> None:
    def check(request: tuple[str, bytes, str]) -> None:
        path, content, content_type = request
        headers = {"content-type": content_type.encode("latin-1")}
        assert_answered(telling.client.post(path, content=content, headers=headers))

    on_many(examples, any_request(), check)
    assert_unharmed(telling)


@examples
def test_right_fields_are_refused_by_name_alone(telling: Running, examples: int) -> None:
    """Each is right by itself, but they may disagree, or the template may not like the conversation."""

    def check(request: tuple[str, dict[str, Any]]) -> None:
        path, body = request
        headers = {"content-type": "application/json"}
        response = telling.client.post(path, content=json.dumps(body), headers=headers)
        assert_answered(response)
        if response.status_code != 200:
            assert re.match(r"\w+", response.json()["error"]["param"])[0] in body

    paths = st.sampled_from(PATHS)
    on_many(examples // 2, paths.flatmap(lambda path: st.tuples(st.just(path), right(path))), check)
    assert_unharmed(telling)


@examples
def test_clients_that_leave_in_the_midst(telling: Running, examples: int) -> None:
    """Of their request, or of its answer."""
    body = json.dumps(
        {"model": "fake", "prompt": ["a", "b"], "n": 3, "max_tokens": 100, "stream": True}
    ).encode()
    head = f"POST {PATHS[0]} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    address = telling.client.base_url.host, telling.client.base_url.port

    def check(cuts: tuple[int, int]) -> None:
        sent, read = cuts
        with socket.create_connection(address, DEADLINE) as connection:
            connection.sendall(request[:sent])
            while sent == len(request) and read > 0:
                read -= len(connection.recv(read))

    whole = st.just(len(request)) | st.integers(0, len(request))
    on_many(examples // 4, st.tuples(whole, st.integers(0, 3_000)), check)
    assert_unharmed(telling)
