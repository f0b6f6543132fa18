"""A server that starts before its workers, or that cannot have them: it says whom, why, and ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from certificates import secret
from real_processes import ServeProcess, Start, WorkerProcess, free_ports
from worker_talk import until

pytestmark = [pytest.mark.multi, pytest.mark.timeout(200)]

ANOTHER_VERSION = """
import sys
import lamina_jax
lamina_jax.__version__ = "7.3.1"
from lamina_jax.attend import main
sys.exit(main())
"""


class OtherRelease(WorkerProcess):
    """A worker of another version."""

    program = ("-c", ANOTHER_VERSION)


def assert_refused(server: ServeProcess, *words: str) -> None:
    """It has ended with one line on stderr that says what is wrong."""
    assert server.exit_code(60) == 1
    error = next(line for line in server.lines if line.startswith("error: "))
    for word in words:
        assert word in error
    assert "Traceback" not in server.said


def test_the_server_first(run: Start, checkpoint: str, expected: list[int]) -> None:
    ports = free_ports(2)
    server = run(ServeProcess, checkpoint, [f"127.0.0.1:{port}" for port in ports]).wait_listening()
    assert server.ready().status_code == 503
    time.sleep(3)
    run(WorkerProcess, "127.0.0.1", ports[1]).wait_listening()
    assert server.popen.poll() is None
    missing = f"waiting for attention workers: 127.0.0.1:{ports[0]}"
    assert until(lambda: server.ready().json()["phase"] == missing)
    run(WorkerProcess, "127.0.0.1", ports[0])
    server.wait_ready()
    assert server.complete(16) == expected[:16]


def test_a_missing_worker(run: Start, checkpoint: str) -> None:
    worker = run(WorkerProcess).wait_listening()
    (port,) = free_ports(1)
    addresses = [worker.address, f"127.0.0.1:{port}"]
    server = run(ServeProcess, checkpoint, addresses, "--worker-wait-seconds", "2")
    assert_refused(server, addresses[1], "nothing listens there", "waited 2 s")
    assert worker.held_by() == ""


def test_a_worker_that_is_stopped(run: Start, checkpoint: str, workers: list[WorkerProcess]) -> None:
    workers[0].send(signal.SIGSTOP)
    addresses = [worker.address for worker in workers]
    server = run(ServeProcess, checkpoint, addresses, "--worker-wait-seconds", "2")
    assert_refused(server, addresses[0], "has not answered in time")


def test_another_version(run: Start, checkpoint: str) -> None:
    worker = run(OtherRelease).wait_listening()
    server = run(ServeProcess, checkpoint, [worker.address])
    assert_refused(server, worker.address, "7.3.1", "run one release on both")


def test_the_wrong_token(run: Start, checkpoint: str, tmp_path: Path) -> None:
    token, wrong = (secret(tmp_path / name, name) for name in ("token", "wrong"))
    worker = run(WorkerProcess, "127.0.0.1", 0, "--token-file", token).wait_listening()
    for given in (("--token-file", wrong), ()):
        server = run(ServeProcess, checkpoint, [worker.address], *given)
        assert_refused(server, worker.address, "--token-file with the same secret")


def test_no_memory(run: Start, checkpoint: str) -> None:
    worker = run(WorkerProcess, "127.0.0.1", 0, "--memory-fraction", "0.001").wait_listening()
    server = run(ServeProcess, checkpoint, [worker.address], "--num-pages", "1000000")
    assert_refused(server, "--num-pages", "1000000")
    assert worker.held_by() == ""


def test_a_worker_of_another_engine(
    run: Start, checkpoint: str, workers: list[WorkerProcess], server: ServeProcess, expected: list[int]
) -> None:
    second = run(ServeProcess, checkpoint, [worker.address for worker in workers])
    assert_refused(second, workers[0].address, f"process {server.engine}")
    assert server.complete(16) == expected[:16]
