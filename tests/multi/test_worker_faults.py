"""A real server over two real workers, of which one is killed, stopped or started again."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time

import httpx
import pytest
from real_processes import (
    LONG,
    MARGIN_SECONDS,
    NOTICED_SECONDS,
    ServeProcess,
    Start,
    WorkerProcess,
)
from worker_talk import until

pytestmark = [pytest.mark.multi, pytest.mark.timeout(300)]

WITHIN = NOTICED_SECONDS + MARGIN_SECONDS


@pytest.fixture(params=["auto", "jax"])
def server(
    request: pytest.FixtureRequest, run: Start, checkpoint: str, workers: list[WorkerProcess]
) -> ServeProcess:
    """Ready, over both workers, by one exchange and the other."""
    addresses = [worker.address for worker in workers]
    started: ServeProcess = run(ServeProcess, checkpoint, addresses, "--exchange", request.param)
    started.wait_ready()
    return started


def test_the_collocated_tokens(server: ServeProcess, expected: list[int]) -> None:
    assert server.complete(LONG) == expected
    assert server.pages_are_back()
    assert server.stats()["compilations_after_ready"] == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_and_comes_back(
    run: Start,
    workers: list[WorkerProcess],
    server: ServeProcess,
    expected: list[int],
    number: signal.Signals,
) -> None:
    victim = workers[1]
    with server.stream() as events:
        next(events)
        began = time.monotonic()
        victim.send(number)
        *_, last = events
    noticed = time.monotonic() - began
    print(f"{number.name}: noticed after {noticed:.2f} s: {last}")
    assert noticed < WITHIN
    assert last["error"]["code"] == "worker_lost"
    assert victim.address in last["error"]["message"]
    assert until(lambda: server.ready().status_code == 503)
    assert server.ready().json()["worker"] == victim.address

    waiting = Waiting(server)
    time.sleep(1.0)
    assert waiting.tokens is None
    began = time.monotonic()
    if number is signal.SIGKILL:
        victim.close()
        run(WorkerProcess, "127.0.0.1", victim.port).wait_listening()
    else:
        victim.send(signal.SIGCONT)
    waiting.thread.join(60)
    print(f"{number.name}: served again after {time.monotonic() - began:.2f} s")
    assert waiting.tokens == expected[:16]
    assert server.ready().status_code == 200
    assert until(server.pages_are_back)
    assert server.stats()["compilations_after_ready"] == 0


class Waiting:
    """A request that is sent now, and answered when it is."""

    def __init__(self, server: ServeProcess) -> None:
        self.tokens: list[int] | None = None
        self._server = server
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.tokens = self._server.complete(16)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_lost_leaves_its_workers_free(
    run: Start,
    checkpoint: str,
    workers: list[WorkerProcess],
    server: ServeProcess,
    expected: list[int],
    number: signal.Signals,
) -> None:
    with server.stream() as events:
        next(events)
        began = time.monotonic()
        server.send(number)
        for worker in workers:
            worker.is_free_within(WITHIN)
    print(f"engine {number.name}: free after {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < WITHIN
    second = run(ServeProcess, checkpoint, [worker.address for worker in workers])
    second.wait_ready()
    assert second.complete(16) == expected[:16]
    if number is signal.SIGSTOP:  # the first finds its workers gone, and that another has them
        server.send(signal.SIGCONT)
        assert until(lambda: server.ready().status_code == 503, WITHIN)
        assert second.complete(16) == expected[:16]
        second.close()
        server.wait_ready(30)
        assert server.complete(16) == expected[:16]


def test_engines_that_end_at_random_moments(
    run: Start, checkpoint: str, workers: list[WorkerProcess], expected: list[int]
) -> None:
    """While they connect, lease, compile, serve: the workers are free for the next."""
    chance = random.Random(11)
    addresses = [worker.address for worker in workers]
    for number in (signal.SIGKILL, signal.SIGSTOP) * 2:
        server = run(ServeProcess, checkpoint, addresses)
        time.sleep(chance.uniform(1.0, 9.0))
        server.send(number)
        for worker in workers:
            worker.is_free_within(WITHIN)
        server.close()
    last = run(ServeProcess, checkpoint, addresses)
    last.wait_ready()
    assert last.complete(16) == expected[:16]
    last.send(signal.SIGTERM)
    assert last.exit_code() == 0
    for worker in workers:
        worker.is_free_within(1.0)


def test_workers_that_end_at_random_moments(
    run: Start, checkpoint: str, workers: list[WorkerProcess], expected: list[int]
) -> None:
    """A server that is ready says so and waits; one that starts ends with an error. Both name the worker."""
    chance = random.Random(5)
    addresses = [worker.address for worker in workers]
    phases = ("importing jax", "loading weights", "slicing", "compiling", "compiling")
    for phase, number in zip(phases, itertools.cycle([signal.SIGSTOP, signal.SIGKILL]), strict=False):
        server = run(ServeProcess, checkpoint, addresses, "--worker-wait-seconds", "3").wait_listening()
        until(lambda server=server, phase=phase: server.ready().json()["phase"] in (phase, "ready"), 60)
        time.sleep(chance.uniform(0.0, 0.5))
        victim = chance.choice(workers)
        victim.send(number)
        assert until(lambda server=server: server.popen.poll() is not None or is_lost(server), 30), (
            server.said
        )
        assert f"attention worker {victim.address}" in server.said
        assert "Traceback" not in server.said
        workers.remove(victim)
        victim.close()
        workers.append(run(WorkerProcess, "127.0.0.1", victim.port).wait_listening())
        if server.popen.poll() is None:
            print(f"{number.name} at {phase!r}: it serves again")
            server.wait_ready()
            assert server.complete(16) == expected[:16]
        else:
            print(f"{number.name} at {phase!r}: {server.lines[-1]}")
            assert server.exit_code() == 1
        server.close()
        for worker in workers:
            worker.is_free_within(WITHIN)


def is_lost(server: ServeProcess) -> bool:
    try:
        return server.ready().json()["phase"] == "worker_lost"
    except httpx.TransportError:  # it has just ended
        return False
