"""The server and its engine's process: whoever dies, stops or is told to end, nothing hangs or stays."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_server
import httpx
import pytest
from fake_server import continuation, in_thread
from real_processes import MARGIN_SECONDS, Process, Start, children_of
from worker_talk import until

from lamina_jax.server.service import SILENT_SECONDS

pytestmark = pytest.mark.multi

HERE = Path(__file__).parent
LONG = 100
"""Tokens that take as many steps."""


class FakeServe(Process):
    """A server in a process, its engine's process over the fake model; see fake_serve.py."""

    def __init__(self, **settings: Any) -> None:
        folders = [str(Path(fake_server.__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = f"PYTHONPATH={os.pathsep.join(filter(None, folders))}"
        super().__init__(
            "env", environment, sys.executable, str(HERE / "fake_serve.py"), json.dumps(settings)
        )
        self.http = httpx.Client(base_url=self.find(r"listening on (http://\S+:\d+)")[1], timeout=30)

    def wait_ready(self) -> FakeServe:
        self.find(r"(?m)^ready: ")
        return self

    @property
    def engine(self) -> int:
        """Its process."""
        (child,) = children_of(self.popen.pid)
        return child

    def complete(self, max_tokens: int = LONG, **more: Any) -> httpx.Response:
        body = {"model": "fake", "prompt": "a", "max_tokens": max_tokens} | more
        return self.http.post("/v1/completions", json=body)

    @contextmanager
    def stream(self, max_tokens: int = LONG) -> Iterator[Iterator[Any]]:
        """The events of a stream that has begun."""
        body = {"model": "fake", "prompt": "a", "max_tokens": max_tokens, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            events = (line if line == "[DONE]" else json.loads(line) for line in lines)
            next(events)
            yield events

    def close(self) -> None:
        super().close()
        if hasattr(self, "http"):
            self.http.close()


def gone(pid: int) -> bool:
    """Whether a process has ended, if only its parent has not asked for its code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_engine_that_is_killed(run: Start) -> None:
    server: FakeServe = run(FakeServe, step_seconds=0.05).wait_ready()
    thread, results = in_thread(server.complete)
    with server.stream() as events:
        began = time.monotonic()
        os.kill(server.engine, signal.SIGKILL)
        *_, last = events
        assert last["error"]["code"] == "engine_died"
        assert "its process was ended by SIGKILL" in last["error"]["message"]
        status = server.http.get("/ready")
        assert time.monotonic() - began < 1 + MARGIN_SECONDS
    assert (status.status_code, status.json()["phase"]) == (503, "failed")
    assert "SIGKILL" in status.json()["error"]
    thread.join(10)
    assert results[0].status_code == 500
    assert results[0].json()["error"]["code"] == "engine_died"
    assert server.exit_code() == 1
    assert "error: its process was ended by SIGKILL\n" in server.said
    assert "Traceback" not in server.said


def test_an_engine_that_is_stopped(run: Start) -> None:
    """It is not ready until it goes on; calls end at their time, and the server when it is told."""
    server: FakeServe = run(FakeServe, step_seconds=0.05, request_seconds=1.5).wait_ready()
    engine = server.engine
    with server.stream() as events:
        os.kill(engine, signal.SIGSTOP)
        *_, last = events
        assert last["error"]["code"] == "timeout"
    assert server.complete().json()["error"]["code"] == "timeout"

    def phase() -> str:
        return server.http.get("/ready").json()["phase"]

    assert until(lambda: phase() == "engine_silent", SILENT_SECONDS + MARGIN_SECONDS)
    os.kill(engine, signal.SIGCONT)
    assert until(lambda: phase() == "ready", 1 + MARGIN_SECONDS)
    os.kill(engine, signal.SIGSTOP)
    server.send(signal.SIGTERM)
    assert server.exit_code() == 0
    assert gone(engine)


@pytest.mark.parametrize("when", ["starting", "streaming", "stopped"])
def test_a_server_that_is_killed_leaves_no_engine(run: Start, when: str) -> None:
    starting = when == "starting"
    server: FakeServe = run(FakeServe, step_seconds=0.05, start_seconds=60.0 if starting else 0.0)
    server.find("compiling 1/9") if starting else server.wait_ready()
    engine = server.engine
    if when == "stopped":
        os.kill(engine, signal.SIGSTOP)
    if when == "streaming":
        with server.stream():
            server.popen.kill()
    server.popen.kill()
    assert until(lambda: gone(engine), 1 + MARGIN_SECONDS)


def test_streams_finish_after_sigterm(run: Start) -> None:
    server: FakeServe = run(FakeServe, step_seconds=0.03).wait_ready()
    with server.stream() as events:
        os.kill(server.engine, signal.SIGTERM)  # some supervisors tell the whole group
        server.send(signal.SIGTERM)
        assert until(lambda: server.http.get("/ready").json()["phase"] == "draining", 5)
        refused = server.complete()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        *chunks, done = events
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == continuation("a", LONG)[-len(text) :]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.exit_code() == 0


def test_a_second_signal_ends_at_once(run: Start) -> None:
    server: FakeServe = run(FakeServe, step_seconds=1.0).wait_ready()
    engine = server.engine
    with server.stream():
        server.send(signal.SIGTERM)
        server.find("a second signal")
        time.sleep(0.5)  # for so long it would count as the same
        began = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.exit_code() == -signal.SIGTERM
        assert until(lambda: gone(engine), 1 + MARGIN_SECONDS)
        assert time.monotonic() - began < 1 + MARGIN_SECONDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling(run: Start, number: signal.Signals) -> None:
    server: FakeServe = run(FakeServe, start_seconds=60.0)
    server.find("compiling 1/9")
    engine = server.engine
    began = time.monotonic()
    for pid in (server.popen.pid, engine):  # Ctrl-C goes to both
        os.kill(pid, number)
    assert server.exit_code() == 0
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 1 + MARGIN_SECONDS
    assert gone(engine)
    assert "Traceback" not in server.said
