"""What tests of real processes share: a tiny checkpoint, its tokens, and a way to start commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from real_processes import Process, ServeProcess, Start, WorkerProcess, reference
from tiny_models import TINY, save_random

MODEL = replace(TINY, num_layers=2, num_kv_heads=2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny"), MODEL))


@pytest.fixture(scope="session")
def expected(checkpoint: str) -> list[int]:
    """The collocated model's greedy tokens."""
    return reference(checkpoint)


@pytest.fixture
def run() -> Iterator[Start]:
    """`run(class, ...)` starts a process, which is killed at the end if it still runs."""
    with ExitStack() as stack:

        def start(kind: type[Process], *arguments: str, **more: object) -> Process:
            return stack.enter_context(closing(kind(*arguments, **more)))

        yield start


@pytest.fixture
def workers(run: Start) -> list[WorkerProcess]:
    """Two, which listen."""
    started = [run(WorkerProcess) for _ in range(2)]
    return [worker.wait_listening() for worker in started]


@pytest.fixture
def server(run: Start, checkpoint: str, workers: list[WorkerProcess]) -> ServeProcess:
    """Ready, over both of them."""
    started: ServeProcess = run(ServeProcess, checkpoint, [worker.address for worker in workers])
    started.wait_ready()
    return started
