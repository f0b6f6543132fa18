"""`launch local` with the real engine and workers: from a cluster file to text over HTTP, and its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from lamina_jax import LLM, SamplingParams

pytestmark = [pytest.mark.multi, pytest.mark.timeout(400)]

START_SECONDS = 200.0
SETTINGS = {"dtype": "float32", "max_num_seqs": 1, "max_model_len": 64, "page_size": 8, "num_pages": 16}
FILE = """
[hosts]
here = "127.0.0.1"
[engine]
host = "here"
[engine.settings]
dtype = "float32"
max_num_seqs = 1
max_model_len = 64
page_size = 8
num_pages = 16
[engine.server]
port = {0}
[[workers]]
host = "here"
port = {1}
devices = "cpu:0"
[[workers]]
host = "here"
port = {2}
devices = "cpu:0"
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


@contextmanager
def launched(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """The launcher, the engine's port, and the lines that come."""
    ports = free_ports(3)
    file = folder / "cluster.toml"
    file.write_text(FILE.format(*ports))
    command = [sys.executable, "-m", "lamina_jax.launch", "local", "--cluster", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,))
    reader.start()
    try:
        yield process, ports[0], lines
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)
        process.stdout.close()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[str], lines: list[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:  # it does not listen yet
            pass
        time.sleep(0.1)


def test_a_cluster_file_to_text_over_http(tmp_path: Path) -> None:
    prompt, sampling = "import os\n", SamplingParams(max_tokens=12, temperature=0)
    expected = LLM("bundled", placement="collocated", **SETTINGS).generate(prompt, sampling)[0].outputs[0]
    with launched(tmp_path) as (process, port, lines):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, process, lines)
            body = {"model": "bundled", "prompt": prompt, "max_tokens": 12, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == expected.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)
    assert {line.partition(" |")[0].strip() for line in lines} == {"launch", "engine", "worker 0", "worker 1"}
