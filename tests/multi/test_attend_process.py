"""Attention workers and engines as processes: they start, end, are killed and stopped; the rest goes on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from certificates import make_certificates
from echo_session import SPEC, hold_the_lock
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_talk import data_channel, echo, room, until

from lamina_jax.config import SecurityConfig
from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.control import WorkerClient, WorkerError, connect
from lamina_jax.exchange.frames import Header, Kind

pytestmark = pytest.mark.multi

HERE = Path(__file__).parent
NOTICED_SECONDS = 5.0
"""3 s are promised; a busy machine gets some more."""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a script beside this file, or a module; what still runs at the end is killed."""
    with ExitStack() as stack:

        def start(what: str, *arguments: str) -> subprocess.Popen[str]:
            program = [str(HERE / what)] if what.endswith(".py") else ["-m", what]
            process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def listening(process: subprocess.Popen[str]) -> str:
    """The address of a worker that was started with port 0, once it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"listening on .* \(port (\d+)", line):
            return f"127.0.0.1:{found[1]}"
    raise AssertionError(f"the worker ended with code {process.wait()}")


@pytest.fixture
def worker(start: Start) -> tuple[subprocess.Popen[str], WorkerClient]:
    process = start("echo_worker.py", "--listen", "127.0.0.1:0")
    (client,) = connect([listening(process)], SecurityConfig())
    return process, client


def exit_code(process: subprocess.Popen[str]) -> int:
    return process.wait(20)


def test_the_command_answers_and_ends_cleanly(start: Start) -> None:
    process = start("lamina_jax.attend", "--listen", "127.0.0.1:0", "--metrics-port", "0")
    address = listening(process)
    (client,) = connect([address], SecurityConfig())
    found = client.describe()
    assert os.path.exists(found.unix_path)
    process.send_signal(signal.SIGTERM)
    assert exit_code(process) == 0
    assert not os.path.exists(found.unix_path)
    again = start("lamina_jax.attend", "--listen", address)
    assert listening(again).rsplit(":", 1)[0] == "127.0.0.1"
    third = start("lamina_jax.attend", "--listen", address)
    assert exit_code(third) == 1
    assert third.stderr is not None
    (line,) = third.stderr.read().splitlines()
    assert f"port {address.split(':')[1]} on 127.0.0.1 is in use" in line


def test_metrics(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    process = start("echo_worker.py", "--listen", "127.0.0.1:0", "--metrics-port", str(port))
    (client,) = connect([listening(process)], SecurityConfig())

    def page() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()

    assert "lamina_worker_lease_held 0.0" in page()
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id)
    assert echo(channel, bytes(100)) == bytes(100)
    shown = page()
    assert "lamina_worker_lease_held 1.0" in shown
    assert "lamina_worker_pages 8.0" in shown
    assert 'lamina_worker_bytes_total{direction="received"} 132.0' in shown
    assert 'lamina_worker_frames_total{direction="sent"} 1.0' in shown
    assert re.search(r"lamina_worker_memory_free_bytes [1-9]", shown)


def test_sigterm_lets_the_engine_finish(worker: tuple[subprocess.Popen[str], WorkerClient]) -> None:
    process, client = worker
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id)
    health = health_pb2_grpc.HealthStub(client.open_channel(()))
    process.send_signal(signal.SIGTERM)
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    assert until(lambda: health.Check(health_pb2.HealthCheckRequest()).status == not_serving)
    with pytest.raises(WorkerError, match="shutting down"):
        client.lease(SPEC)
    assert echo(channel, b"still served") == b"still served"
    lease.close()
    assert exit_code(process) == 0


def test_a_second_signal_ends_at_once(worker: tuple[subprocess.Popen[str], WorkerClient]) -> None:
    process, client = worker
    lease = client.lease(SPEC)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert exit_code(process) == 130
    assert until(lambda: lease.lost is not None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_is_noticed(
    worker: tuple[subprocess.Popen[str], WorkerClient], number: signal.Signals
) -> None:
    """By one who waits for an answer, too."""
    process, client = worker
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id, idle_seconds=60)  # only the lost lease can end a wait
    lease.on_lost(lambda reason: channel.close())
    echo(channel, b"x")
    threading.Timer(0.5, process.send_signal, (number,)).start()
    began = time.monotonic()
    with pytest.raises(ChannelClosed):
        channel.receive(room)
    assert time.monotonic() - began < 0.5 + NOTICED_SECONDS
    assert until(lambda: lease.lost is not None)
    assert "is gone" in str(lease.lost)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_an_engine_that_dies_or_stops_loses_its_lease(
    start: Start, worker: tuple[subprocess.Popen[str], WorkerClient], number: signal.Signals
) -> None:
    _, client = worker
    engine = start("echo_engine.py", client.address)
    assert engine.stdout is not None
    assert engine.stdout.readline() == "leased\n"
    assert str(engine.pid) in client.describe().held_by
    engine.send_signal(number)
    assert until(lambda: client.describe().held_by == "", NOTICED_SECONDS)
    lease = client.lease(SPEC)
    assert echo(data_channel(client, lease.session_id), b"next") == b"next"


def test_nobody_who_is_busy_looks_dead(worker: tuple[subprocess.Popen[str], WorkerClient]) -> None:
    """Neither side runs any Python of another thread for longer than a silent peer is given."""
    _, client = worker
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id, idle_seconds=60)
    channel.send(Header(Kind.QUERY, 4, step=1), [np.frombuffer(b"busy", np.uint8)])
    header, _ = channel.receive(room)
    assert header.kind is Kind.ANSWER
    hold_the_lock()
    assert echo(channel, b"x") == b"x"
    assert lease.lost is None


def test_mutual_tls_and_a_token_between_processes(start: Start, tmp_path: Path) -> None:
    files = make_certificates(tmp_path)

    def security(side: str, token: str) -> SecurityConfig:
        return SecurityConfig(
            token_file=str(files / token),
            tls_cert=str(files / f"{side}.pem"),
            tls_key=str(files / f"{side}.key"),
            tls_ca=str(files / "ca.pem"),
        )

    fields = vars(security("worker", "token")).items()
    flags = [part for name, value in fields if value for part in (f"--{name.replace('_', '-')}", value)]
    address = listening(start("echo_worker.py", "--listen", "127.0.0.1:0", *flags))
    (client,) = connect([address], security("engine", "token"))
    lease = client.lease(SPEC)
    assert echo(data_channel(client, lease.session_id), b"x") == b"x"
    with pytest.raises(WorkerError, match="token"):
        connect([address], security("engine", "wrong"))
