"""What tests of real processes share: a tiny checkpoint, its tokens, and a way to start commands."""

from __future__ import annotations

from dataclasses import replace

import pytest
from process_fixtures import expected, run, workers
from real_processes import ServeProcess, Start, WorkerProcess
from tiny_models import TINY, save_random

__all__ = ["expected", "run", "workers"]

MODEL = replace(TINY, num_layers=2, num_kv_heads=2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny"), MODEL))


@pytest.fixture
def server(run: Start, checkpoint: str, workers: list[WorkerProcess]) -> ServeProcess:
    """Ready, over both of them."""
    started: ServeProcess = run(ServeProcess, checkpoint, [worker.address for worker in workers])
    started.wait_ready()
    return started
