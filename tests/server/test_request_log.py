"""Request ids, and the line that the log gets for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

import httpx
import pytest
from fake_server import DEADLINE, Running, continuation
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lamina_jax.server.log_format import JsonFormatter, TextFormatter
from lamina_jax.server.request_log import RequestLog

SECRET = "the secret of the prompt"


async def endpoint(request: Request) -> Response:
    record = request.state.record
    record.call_id, record.prompt_tokens, record.completion_tokens = "cmpl-1", 5, 2
    record.first_token_seconds = 0.25
    record.finish_reasons.update(["stop", "length", "stop"])
    return PlainTextResponse(SECRET + (await request.body()).decode(), 202)


async def fail(request: Request) -> Response:
    raise RuntimeError("broken")


APP = Starlette(routes=[Route("/v1/completions", endpoint, methods=["POST"]), Route("/fail", fail)])


def ask(
    path: str = "/v1/completions", method: str = "POST", app: ASGIApp = APP, **headers: str
) -> httpx.Response:
    transport = httpx.ASGITransport(RequestLog(app), raise_app_exceptions=False)

    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.request(method, path, headers=headers, content=SECRET)

    return asyncio.run(call())


@pytest.mark.parametrize("asked", ["abc", "A-b_c.9", "x" * 128])
def test_a_sane_id_is_kept(asked: str) -> None:
    assert ask(**{"x-request-id": asked}).headers["x-request-id"] == asked


@pytest.mark.parametrize(
    "asked", [None, "", "a b", "x" * 129, "a;b", "é".encode("latin-1").decode("latin-1"), "a\tb"]
)
def test_any_other_is_replaced(asked: str | None) -> None:
    headers = {} if asked is None else {"x-request-id": asked.encode("latin-1")}
    first, second = (ask(**headers).headers["x-request-id"] for _ in range(2))  # type: ignore[arg-type]
    assert len(first) == len(second) == 32
    assert first != second


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/fail", 500)])
def test_answers_with_an_error_carry_it_too(path: str, status: int) -> None:
    response = ask(path, "GET", **{"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (status, "mine")


def line(caplog: pytest.LogCaptureFixture, formatter: logging.Formatter) -> str:
    (record,) = (record for record in caplog.records if record.name == "lamina_jax.server.request_log")
    return formatter.format(record)


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lamina_jax")


def test_the_line_in_text(caplog: pytest.LogCaptureFixture) -> None:
    ask(**{"x-request-id": "mine"})
    text = line(caplog, TextFormatter())
    head, _, tail = text.partition(" total_s=")
    assert head == (
        "POST /v1/completions 202 request_id=mine call_id=cmpl-1 prompt_tokens=5 completion_tokens=2 "
        "first_token_s=0.25"
    )
    assert tail.partition(" ")[2] == "finish_reason=length,stop"
    assert SECRET not in text


def test_the_line_in_json(caplog: pytest.LogCaptureFixture) -> None:
    ask(**{"x-request-id": "mine"})
    body = json.loads(line(caplog, JsonFormatter()))
    assert body["message"] == "POST /v1/completions 202"
    assert (body["request_id"], body["call_id"], body["level"]) == ("mine", "cmpl-1", "INFO")
    assert (body["prompt_tokens"], body["completion_tokens"]) == (5, 2)
    assert 0 <= body["total_s"] < 10
    assert body["time"].endswith("+00:00")


def test_a_path_cannot_write_lines(caplog: pytest.LogCaptureFixture) -> None:
    ask("/a%0Ab%22" + "c" * 1000)
    text = line(caplog, TextFormatter())
    assert text.startswith("POST /a%0Ab%22ccc")
    assert len(text) < 250


def test_probes_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/ready", "/metrics"):
        ask(path, "GET")
    assert not caplog.records


def test_a_failure_is_logged_with_its_traceback() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        record = logging.LogRecord("a", logging.ERROR, "file", 1, "died %d", (3,), sys.exc_info())
    body = json.loads(JsonFormatter().format(record))
    assert body["message"] == "died 3"
    assert "RuntimeError: broken" in body["exception"]
    assert "RuntimeError: broken" in TextFormatter().format(record)


@pytest.mark.parametrize("stream", [True, False])
def test_the_line_of_a_completion(fake: Running, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    response = fake.client.post(
        "/v1/completions",
        json={"model": "fake", "prompt": ["hide", "this"], "max_tokens": 6, "stream": stream},
        headers={"x-request-id": "mine"},
    )
    assert response.headers["x-request-id"] == "mine"
    fields = json.loads(wait_for_line(caplog))
    assert fields["message"] == "POST /v1/completions 200"
    assert fields["call_id"] in response.text
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (8, 12)
    assert 0 < fields["first_token_s"] <= fields["total_s"]
    assert fields["finish_reason"] == "length"
    assert "hide" not in caplog.text
    assert continuation("hide", 6) not in caplog.text


def test_the_line_of_a_refusal(fake: Running, caplog: pytest.LogCaptureFixture) -> None:
    response = fake.complete("a" * 1000)
    fields = json.loads(wait_for_line(caplog))
    assert fields["message"] == "POST /v1/completions 400"
    assert fields["error"] == response.json()["error"]["code"] == "context_length_exceeded"
    assert "aaa" not in caplog.text


def wait_for_line(caplog: pytest.LogCaptureFixture) -> str:
    """The server writes it after the answer's end."""
    deadline = time.monotonic() + DEADLINE
    while not any(record.name == "lamina_jax.server.request_log" for record in caplog.records):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return line(caplog, JsonFormatter())
