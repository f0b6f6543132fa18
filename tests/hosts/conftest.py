"""What tests of several hosts share: a tiny checkpoint, its tokens, workers, and two compute hosts."""

from __future__ import annotations

import pytest
from compute_hosts import MODEL, Hosts
from process_fixtures import expected, run, workers
from real_processes import Start, WorkerProcess
from tiny_models import save_random

__all__ = ["expected", "run", "workers"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny"), MODEL))


@pytest.fixture
def hosts(run: Start, checkpoint: str, workers: list[WorkerProcess], request: pytest.FixtureRequest) -> Hosts:
    """Two over two workers, ready; a parameter is the exchange."""
    more = ("--exchange", getattr(request, "param", "auto"))
    started = Hosts(run, checkpoint, [worker.address for worker in workers], more=more)
    started.server.wait_ready()
    return started
