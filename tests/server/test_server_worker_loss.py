"""A worker is lost under the server: who is told what, who waits, and that everything ends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fake_server import (
    DEADLINE,
    NUM_PAGES,
    FakeEngine,
    GatedRunner,
    Running,
    continuation,
    in_thread,
    pages_are_back,
    running,
    sse,
)
from losable_runner import WORKER, LosableRunner

FOR_EVER = 10**9
SEATS = 4


@contextmanager
def losable(**settings: Any) -> Iterator[tuple[Running, LosableRunner]]:
    runner = LosableRunner(GatedRunner)
    with running(FakeEngine(runner=runner).build, **settings) as server:
        yield server, runner


def is_lost(response: httpx.Response) -> bool:
    return response.status_code == 503 and response.json()["phase"] == "worker_lost"


def lose_in_idleness(server: Running, runner: LosableRunner) -> None:
    """And it stays lost until the runner is told to revive."""
    runner.kill("check", tries=FOR_EVER)
    server.wait_for("/ready", is_lost)


def assert_worker_lost(response: httpx.Response, *, stream: bool) -> None:
    body = sse(response.text)[-1] if stream else response.json()
    assert body["error"]["code"] == "worker_lost"
    assert body["error"]["type"] == "server_error"
    assert f"attention worker {WORKER} is lost: its connection broke" in body["error"]["message"]
    assert response.status_code == (200 if stream else 503)
    if not stream:
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at", ["dispatch", "read"])
def test_what_runs_ends_with_an_error_that_names_the_worker(stream: bool, at: str) -> None:
    with losable() as (server, runner):
        runner.inner.step_seconds = 0.04
        calls = [
            in_thread(lambda prompt=prompt: server.complete(prompt, max_tokens=60, stream=stream))
            for prompt in ("a", ["b", "c"])
        ]
        server.wait_for("/stats", lambda response: response.json()["requests_running"] == 3)
        runner.kill(at, tries=FOR_EVER)
        for thread, results in calls:
            thread.join(DEADLINE)
            assert_worker_lost(results[0], stream=stream)
        status = server.client.get("/ready")
        assert is_lost(status)
        assert status.json()["worker"] == WORKER
        assert status.json()["reason"] == f"its connection broke at {at}"
        assert "retry-after" in status.headers
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/v1/models").status_code == 200
        assert pages_are_back(server.client.get("/stats"))
        runner.revive()
        server.wait_ready()
        assert "worker" not in server.client.get("/ready").json()
        assert server.complete("a", max_tokens=3).json()["choices"][0]["text"] == continuation("a", 3)


def test_what_waits_is_served_when_the_worker_is_back(capsys: pytest.CaptureFixture[str]) -> None:
    with losable() as (server, runner):
        lose_in_idleness(server, runner)
        calls = {
            prompt: in_thread(lambda prompt=prompt: server.complete(prompt, max_tokens=9, stream=False))
            for prompt in "abcdefg"
        }
        server.wait_for("/stats", lambda response: response.json()["requests_waiting"] == len(calls))
        runner.revive()
        for prompt, (thread, results) in calls.items():
            thread.join(DEADLINE)
            assert results[0].json()["choices"][0]["text"] == continuation(prompt, 9)
        server.wait_for("/stats", pages_are_back)
    told = capsys.readouterr().err
    assert f"not ready: attention worker {WORKER} is lost: its connection broke at check\n" in told
    assert told.rindex("ready: http") > told.index("not ready")


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_too_long_is_told_of_the_worker(stream: bool) -> None:
    with losable(request_seconds=0.4) as (server, runner):
        lose_in_idleness(server, runner)
        response = server.complete("abc", max_tokens=20, stream=stream)
        assert_worker_lost(response, stream=stream)
        assert "request_seconds" in response.text
        server.wait_for("/stats", pages_are_back)
        runner.revive()
        server.wait_ready()
        assert server.complete("a", max_tokens=3).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_during_the_loss_is_forgotten(stream: bool) -> None:
    with losable() as (server, runner):
        lose_in_idleness(server, runner)
        url = server.client.base_url.join("/v1/completions")
        body = {"model": "fake", "prompt": ["a", "b"], "stream": stream}
        with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=0.3) as answer:
            answer.read()
        server.wait_for("/stats", pages_are_back)
        assert server.client.get("/stats").json()["pages_total"] == NUM_PAGES


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_during_the_loss_ends_in_time(stream: bool) -> None:
    with losable(drain_seconds=0.3) as (server, runner):
        lose_in_idleness(server, runner)
        thread, results = in_thread(lambda: server.complete("abc", stream=stream))
        server.wait_for("/stats", lambda response: response.json()["requests_waiting"] == 1)
        started = time.monotonic()
        server.stop()
        assert server.wait_ended() == 0
        assert time.monotonic() - started < 3
        thread.join(DEADLINE)
        body = sse(results[0].text)[-1] if stream else results[0].json()
        assert body["error"]["code"] == "shutting_down"


def test_what_waits_at_a_stop_is_still_served_if_the_worker_comes_back() -> None:
    with losable() as (server, runner):
        lose_in_idleness(server, runner)
        thread, results = in_thread(lambda: server.complete("abc", max_tokens=5))
        server.wait_for("/stats", lambda response: response.json()["requests_waiting"] == 1)
        server.stop()
        runner.revive()
        thread.join(DEADLINE)
        assert results[0].json()["choices"][0]["text"] == continuation("abc", 5)
        assert server.wait_ended() == 0


def test_a_lost_worker_keeps_no_core_busy() -> None:
    with losable() as (server, runner):
        lose_in_idleness(server, runner)
        thread, _ = in_thread(lambda: server.complete("abc", max_tokens=5))
        engine = next(thread for thread in threading.enumerate() if thread.name == "engine")
        clock = time.pthread_getcpuclockid(engine.ident or 0)
        used = time.clock_gettime(clock)
        time.sleep(0.5)
        assert time.clock_gettime(clock) - used < 0.05
        runner.revive()
        thread.join(DEADLINE)


def test_every_call_ends_once_while_workers_come_and_go() -> None:
    """Served as if nothing had been, or told of the loss."""
    chance = random.Random(5)
    with losable() as (server, runner):
        runner.inner.step_seconds = 0.002

        def kill_now_and_then() -> None:
            for _ in range(4):
                time.sleep(chance.uniform(0.05, 0.3))
                if not runner.lost:
                    runner.kill(chance.choice(["dispatch", "read"]), tries=chance.randint(1, 3))

        def call(number: int) -> tuple[str, httpx.Response]:
            prompt = chr(ord("a") + number)
            return prompt, server.complete(prompt, max_tokens=40, stream=bool(number % 2))

        killer, _ = in_thread(kill_now_and_then)
        calls = [in_thread(lambda number=number: call(number)) for number in range(5 * SEATS)]
        served = 0
        for thread, results in calls:
            thread.join(DEADLINE)
            prompt, response = results[0]
            stream = response.headers["content-type"].startswith("text/event-stream")
            if "worker_lost" in response.text:
                assert_worker_lost(response, stream=stream)
            else:
                assert said(response, stream=stream) == continuation(prompt, 40)
                served += 1
        killer.join(DEADLINE)
        runner.revive()
        server.wait_ready()
        server.wait_for("/stats", pages_are_back)
        assert runner.losses
        assert len(calls) - SEATS * runner.losses <= served < len(calls)


def said(response: httpx.Response, *, stream: bool) -> str:
    chunks = sse(response.text)[:-1] if stream else [response.json()]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)
