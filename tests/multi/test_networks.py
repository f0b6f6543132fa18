"""A worker behind a proxy that is a worse network: slow, narrow, stalled, cut."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from real_processes import MARGIN_SECONDS, NOTICED_SECONDS, ServeProcess, Start, WorkerProcess
from worker_talk import until

from lamina_jax.benchmarks.tcp_proxy import Proxy

pytestmark = [pytest.mark.multi, pytest.mark.timeout(200)]

HOST = "127.0.0.2"
WITHIN = NOTICED_SECONDS + MARGIN_SECONDS
Network = list[Proxy]
Lay = Callable[..., Network]


@pytest.fixture
def worker(run: Start) -> WorkerProcess:
    started: WorkerProcess = run(WorkerProcess)
    return started.wait_listening()


@pytest.fixture
def lay(worker: WorkerProcess) -> Iterator[Lay]:
    """`lay(delay, rate, control_rate)`: the worker's two ports, again at HOST; `rate` is that of data."""
    with ExitStack() as stack:

        def start(delay: float = 0.0, rate: float = math.inf, control_rate: float = math.inf) -> Network:
            network = []
            for port, pace in ((worker.port, control_rate), (worker.data_port, rate)):
                proxy = Proxy(f"{HOST}:{port}", f"{worker.host}:{port}", delay, pace)
                proxy.start()
                network.append(stack.enter_context(closing(proxy)))
            return network

        yield start


@pytest.fixture
def serve(run: Start, checkpoint: str, worker: WorkerProcess) -> Callable[..., ServeProcess]:
    def start(exchange: str) -> ServeProcess:
        server: ServeProcess = run(
            ServeProcess, checkpoint, [f"{HOST}:{worker.port}"], "--exchange", exchange
        )
        server.wait_ready()
        return server

    return start


@pytest.mark.parametrize(
    ("exchange", "delay", "rate"),
    [("socket", 0.001, math.inf), ("socket", 0.01, math.inf), ("grpc", 0.01, math.inf), ("socket", 0.0, 1e5)],
)
def test_the_collocated_tokens_however_slow_it_is(
    lay: Lay,
    serve: Callable[..., ServeProcess],
    expected: list[int],
    exchange: str,
    delay: float,
    rate: float,
) -> None:
    lay(delay, rate)
    server = serve(exchange)
    began = time.monotonic()
    assert server.complete(40) == expected[:40]
    query_bytes, steps, layers = 256, 39, 2
    assert time.monotonic() - began > steps * layers * (2 * delay + query_bytes / rate)


def test_a_short_stall_is_no_loss(lay: Lay, serve: Callable[..., ServeProcess], expected: list[int]) -> None:
    network = lay(delay=0.001)
    server = serve("socket")
    with server.stream(60) as events:
        found = next(events)["choices"][0]["token_ids"]
        for proxy in network:
            proxy.stall()
        time.sleep(1.0)
        for proxy in network:
            proxy.resume()
        for event in events:
            found += event["choices"][0]["token_ids"]
    assert found == expected[:60]


@pytest.mark.parametrize("exchange", ["socket", "grpc"])
def test_a_long_stall_is_a_loss_until_it_ends(
    lay: Lay,
    serve: Callable[..., ServeProcess],
    worker: WorkerProcess,
    expected: list[int],
    exchange: str,
) -> None:
    network = lay(delay=0.001)
    server = serve(exchange)
    with server.stream() as events:
        next(events)
        began = time.monotonic()
        for proxy in network:
            proxy.stall()
        *_, last = events
    noticed = time.monotonic() - began
    print(f"{exchange}: a stall is noticed after {noticed:.2f} s: {last}")
    assert noticed < WITHIN
    assert f"{HOST}:{worker.port}" in last["error"]["message"]
    worker.is_free_within(WITHIN - noticed)
    assert server.ready().json()["phase"] == "worker_lost"
    for proxy in network:
        proxy.resume()
    print(f"{exchange}: ready {server.wait_ready(30):.2f} s after it")
    assert server.complete(16) == expected[:16]
    assert until(server.pages_are_back)


@pytest.mark.parametrize("exchange", ["socket", "grpc"])
def test_cut_within_frames(
    lay: Lay, serve: Callable[..., ServeProcess], expected: list[int], exchange: str
) -> None:
    """A chunk of the prompt takes half a second to pass, so that most cuts come within one."""
    network = lay(rate=2e4) if exchange == "socket" else lay(control_rate=4e4)
    server = serve(exchange)
    chance = random.Random(3)
    for turn in range(3):
        with server.stream(8, prompt=[7] * 100) as events:
            time.sleep(chance.uniform(0.2, 1.5))
            cut = network if turn == 1 or exchange == "grpc" else network[1:]
            began = time.monotonic()
            for proxy in cut:
                proxy.cut()
            *_, last = events
        assert time.monotonic() - began < WITHIN
        assert last["error"]["code"] == "worker_lost"
        server.wait_ready(30)
        assert until(server.pages_are_back)
    assert server.complete(8) == expected[:8]
