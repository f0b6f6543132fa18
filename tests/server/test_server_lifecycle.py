"""Starting, failing, dying, draining, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_server import (
    DEADLINE,
    EngineThread,
    FakeEngine,
    Running,
    continuation,
    in_thread,
    pages_are_back,
    running,
    sse,
    tokenizer,
)
from fastapi.testclient import TestClient

from lamina_jax.config import ConfigError, ServerConfig
from lamina_jax.server import engine_loop
from lamina_jax.server import service as lamina_service
from lamina_jax.server.app import create_app
from lamina_jax.server.lifecycle import Server
from lamina_jax.server.listener import listen
from lamina_jax.server.messages import Alive, Died, Ready
from lamina_jax.server.service import Service
from lamina_jax.weights.tokenizer import Tokenizer

Report = Callable[[str, int, int], None]


def test_before_it_is_ready_it_says_how_far_it_is() -> None:
    may_go_on = threading.Event()

    def slow(report: Report) -> None:
        report("loading weights", 0, 0)
        report("compiling", 3, 24)
        assert may_go_on.wait(DEADLINE)

    with running(FakeEngine(before=slow).build, ready=False) as server:
        assert server.client.get("/health").json() == {"status": "ok"}
        status = server.wait_for("/ready", lambda response: response.json()["phase"] == "compiling")
        assert status.status_code == 503
        assert "retry-after" in status.headers
        first = status.json()
        assert (first["done"], first["total"]) == (3, 24)
        assert server.client.get("/ready").json()["elapsed_s"] > first["elapsed_s"] > 0
        for refused in (server.complete(), server.client.get("/v1/models"), server.client.get("/stats")):
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "not_ready"
            assert "compiling" in refused.json()["error"]["message"]
        may_go_on.set()
        server.wait_ready()
        assert server.complete("a", max_tokens=2).json()["choices"][0]["text"] == continuation("a", 2)
    assert server.code == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("no such folder"), "error: no such folder\n"),
        (RuntimeError("out of memory"), "error: RuntimeError: out of memory\n"),
    ],
)
def test_a_start_that_fails(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(report: Report) -> None:
        raise error

    with running(FakeEngine(before=fail).build, ready=False) as server:
        assert server.wait_ended() == 1
    assert line in capsys.readouterr().err


def test_stopping_while_it_starts_does_not_wait_for_the_start() -> None:
    reported, may_end = threading.Event(), threading.Event()

    def slow(report: Report) -> None:
        reported.set()
        may_end.wait(DEADLINE)
        report("compiling", 1, 2)  # ends the start
        raise AssertionError("the start went on")

    with running(FakeEngine(before=slow).build, ready=False) as server:
        assert reported.wait(DEADLINE)
        started = time.monotonic()
        server.stop()
        assert server.wait_ended() == 0
        assert server.engine.is_alive()
        assert time.monotonic() - started < 5
        may_end.set()


def test_a_server_that_is_stopped_before_it_runs_ends() -> None:
    config = ServerConfig(port=0)
    engine = EngineThread(FakeEngine().build)
    server = Server(engine, lambda: None, "fake", config)
    server.stop()
    assert asyncio.run(asyncio.wait_for(server.run(listen(config)), DEADLINE)) == 0


def test_an_engine_that_dies_ends_its_requests_and_the_process() -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        thread, results = in_thread(lambda: server.complete("a", max_tokens=50))
        assert fake.runner.reading.wait(DEADLINE)
        fake.runner.fault = RuntimeError("device lost")
        fake.runner.gate.set()
        thread.join(DEADLINE)
        (response,) = results
        assert response.status_code == 500
        assert_says_what_happened(response.json())
        assert server.wait_ended() == 1


def test_an_engine_that_dies_ends_a_stream_with_an_error() -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        body = {"model": "fake", "prompt": "a", "max_tokens": 50, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            fake.runner.fault = RuntimeError("device lost")
            fake.runner.gate.set()
            assert_says_what_happened(sse(response.read().decode())[-1])
        assert server.wait_ended() == 1


def assert_says_what_happened(body: dict[str, Any]) -> None:
    assert body["error"]["type"] == "server_error"
    assert "RuntimeError: device lost" in body["error"]["message"]


def test_a_dead_engine_is_not_ready() -> None:
    """As it is seen until the process has ended."""
    service = Service("fake", lambda message: None, request_seconds=1.0)
    service.take(Ready({"max_model_len": 8}))
    assert service.phase == "ready"
    service.take(Died("RuntimeError: device lost"))
    response = TestClient(create_app(service)).get("/ready")
    assert response.status_code == 503
    assert response.json()["error"] == "RuntimeError: device lost"


def test_an_engine_that_is_silent_is_not_ready_until_it_is_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is while its process is stopped, whose socket stays open."""
    service = Service("fake", lambda message: None, request_seconds=1.0)
    client = TestClient(create_app(service))
    service.take(Ready({"max_model_len": 8}))
    assert client.get("/ready").status_code == 200
    monkeypatch.setattr(lamina_service, "SILENT_SECONDS", 0.2)
    time.sleep(0.3)
    silent = client.get("/ready")
    assert silent.status_code == 503
    assert silent.json()["phase"] == "engine_silent"
    assert silent.json()["silent_s"] >= 0.3
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 200, "calls wait for it"
    monkeypatch.undo()
    service.take(Alive())
    assert client.get("/ready").status_code == 200
    assert service.silent_seconds < 0.3


def test_an_engine_is_heard_while_a_step_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lamina_service, "SILENT_SECONDS", 1.0)
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        thread, _ = in_thread(lambda: server.complete("a", max_tokens=2))
        assert fake.runner.reading.wait(DEADLINE)
        time.sleep(1.3)
        assert server.client.get("/ready").json()["phase"] == "ready"
        fake.runner.gate.set()
        thread.join(DEADLINE)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c", "d", "e", "f"]])
def test_a_client_that_leaves_gives_its_pages_back(stream: bool, prompts: list[str]) -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        fake.runner.step_seconds = 0.02
        body = {"model": "fake", "prompt": prompts, "max_tokens": 100, "stream": stream}
        url = server.client.base_url.join("/v1/completions")
        with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=0.3) as answer:
            answer.read()
        fake.runner.gate.set()
        server.wait_for("/stats", pages_are_back)
        stats = server.client.get("/stats").json()
        assert stats["steps"] < 90, "the request went on after its client had left"
        assert server.complete("a", max_tokens=3).json()["choices"][0]["text"] == continuation("a", 3)


def test_a_stop_finishes_what_runs_and_takes_nothing_new() -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        thread, results = in_thread(lambda: server.complete("abc", max_tokens=20, stream=True))
        assert fake.runner.reading.wait(DEADLINE)
        server.stop()
        server.wait_for("/ready", lambda response: response.json()["phase"] == "draining")
        refused = server.complete()
        assert refused.status_code == 503
        assert "draining" in refused.json()["error"]["message"]
        fake.runner.gate.set()
        thread.join(DEADLINE)
        chunks = sse(results[0].text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == continuation("abc", 20)
        assert server.wait_ended() == 0


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_end_in_time_is_ended_with_an_error(stream: bool) -> None:
    fake = FakeEngine()
    with running(fake.build, drain_seconds=0.2) as server:
        fake.runner.gate.clear()
        thread, results = in_thread(lambda: server.complete("abc", max_tokens=20, stream=stream))
        assert fake.runner.reading.wait(DEADLINE)
        server.stop()
        thread.join(DEADLINE)
        body = sse(results[0].text)[-1] if stream else results[0].json()
        assert body["error"]["code"] == "shutting_down"
        fake.runner.gate.set()
        assert server.wait_ended() == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_has_a_deadline(stream: bool) -> None:
    fake = FakeEngine()
    with running(fake.build, request_seconds=0.3) as server:
        fake.runner.gate.clear()
        response = server.complete("abc", max_tokens=20, stream=stream)
        body = sse(response.text)[-1] if stream else response.json()
        assert body["error"]["code"] == "timeout"
        fake.runner.gate.set()
        server.wait_for("/stats", pages_are_back)


class SlowTokenizer(Tokenizer):
    """Takes its time for a text, and counts them."""

    texts = 0

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        self.texts += 1
        time.sleep(0.5)
        return super().encode(text, special_tokens=special_tokens)


@pytest.fixture
def slow() -> SlowTokenizer:
    return SlowTokenizer(tokenizer().inner)


def test_a_client_that_leaves_has_no_more_texts_tokenised(slow: SlowTokenizer) -> None:
    with running(FakeEngine().build, load_tokenizer=lambda: slow) as server:
        url = server.client.base_url.join("/v1/completions")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={"model": "fake", "prompt": ["a"] * 40}, timeout=0.3)
        time.sleep(0.7)
        assert slow.texts < 3


def test_the_time_that_texts_take_counts_and_the_end_does_not_wait_for_them(slow: SlowTokenizer) -> None:
    started = time.monotonic()
    with running(FakeEngine().build, request_seconds=0.3, load_tokenizer=lambda: slow) as server:
        response = server.complete(["abc"] * 40)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
    assert time.monotonic() - started < 10


def test_the_engine_sleeps_when_it_has_nothing_to_do(fake: Running) -> None:
    fake.complete("a")
    engine = next(thread for thread in threading.enumerate() if thread.name == "engine")
    before = time.pthread_getcpuclockid(engine.ident or 0)
    used = time.clock_gettime(before)
    time.sleep(0.3)
    assert time.clock_gettime(before) - used < 0.05


def test_a_port_in_use_names_the_port_and_the_flag() -> None:
    with listen(ServerConfig(port=0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port"):
            listen(ServerConfig(port=port))


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.*--host"):
        listen(ServerConfig(host="192.0.2.1", port=0, insecure=True))
