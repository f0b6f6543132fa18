"""`launch local` with the cluster files of compute and prefill hosts: text over HTTP, then the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from real_processes import children_of, free_ports
from worker_talk import until

from lamina_jax import LLM, SamplingParams
from lamina_jax.cluster.file import find_cluster_file

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(500)]

START_SECONDS = 300.0
PROMPT = "import os\n"
SETTINGS = {"dtype": "float32", "max_num_seqs": 1, "max_model_len": 64, "page_size": 8, "num_pages": 16}


@contextmanager
def launched(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client, Path]]:
    """The launcher of a shipped file, on free ports and with few programs; a client; the output's file."""
    ports = iter(free_ports(8))
    text = find_cluster_file(name).read_text()
    text = re.sub(r"(?<=port = )\d+", lambda _: str(next(ports)), text)
    own = "\n".join(f"{key} = {value!r}" for key, value in SETTINGS.items())
    text = re.sub(r"^max_num_seqs = .*$", own, text, flags=re.MULTILINE)
    file, output = folder / f"{name}.toml", folder / "output"
    file.write_text(text)
    port = re.search(r"\[engine.server\]\nport = (\d+)", text)
    assert port
    command = [sys.executable, "-m", "lamina_jax.launch", "local", "--cluster", str(file)]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port[1]}", timeout=60) as client:
            yield process, client, output
    finally:
        process.kill()
        process.wait(10)


def wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client, output: Path) -> None:
    def ready() -> bool:
        assert process.poll() is None, output.read_text()
        try:
            return client.get("/ready").status_code == 200
        except httpx.TransportError:
            time.sleep(0.2)
            return False

    assert until(ready, START_SECONDS), output.read_text()


@pytest.fixture(scope="module")
def expected() -> str:
    """What one process answers."""
    sampling = SamplingParams(max_tokens=12, temperature=0)
    return LLM("bundled", placement="collocated", **SETTINGS).generate(PROMPT, sampling)[0].outputs[0].text


def answer(client: httpx.Client) -> str:
    body = {"model": "bundled", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_prefill_answers_and_ends_at_a_signal(tmp_path: Path, expected: str) -> None:
    with launched(tmp_path, "prefill") as (process, client, output):
        wait_until_ready(process, client, output)
        assert answer(client) == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, output.read_text()


def test_two_by_two_answers_and_ends_when_a_follower_dies(tmp_path: Path, expected: str) -> None:
    """Who launches them again has the service back."""
    with launched(tmp_path, "two-by-two") as (process, client, output):
        wait_until_ready(process, client, output)
        assert answer(client) == expected
        (follower,) = (
            pid
            for pid in children_of(process.pid)
            if b"\0--host-id\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(follower, signal.SIGKILL)
        assert process.wait(30) == 128 + signal.SIGKILL, output.read_text()
    assert "follower 1 ended by SIGKILL: ending the others" in output.read_text()
