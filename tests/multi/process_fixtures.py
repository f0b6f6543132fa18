"""Fixtures of all tests that start commands; a conftest imports them beside a `checkpoint` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from real_processes import Process, Start, WorkerProcess, reference

__all__ = ["expected", "run", "workers"]


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
