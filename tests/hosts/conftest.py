"""What tests of several hosts share: a tiny checkpoint, its tokens, workers, and two compute hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from compute_hosts import MODEL, Hosts
from real_processes import Process, Start, WorkerProcess, reference
from tiny_models import save_random


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

        def start(kind: type[Process], *arguments: object, **more: object) -> Process:
            return stack.enter_context(closing(kind(*arguments, **more)))

        yield start


@pytest.fixture
def workers(run: Start) -> list[WorkerProcess]:
    """Two, which listen."""
    started = [run(WorkerProcess) for _ in range(2)]
    return [worker.wait_listening() for worker in started]


@pytest.fixture
def hosts(run: Start, checkpoint: str, workers: list[WorkerProcess]) -> Hosts:
    """Two over two workers, ready."""
    started = Hosts(run, checkpoint, [worker.address for worker in workers])
    started.server.wait_ready()
    return started
