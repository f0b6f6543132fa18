"""`python -m lamina_jax.serve` as a process: from the command line to text over HTTP, and its ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import jax.numpy as jnp
import pytest
from fake_server import tokenizer

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import ServerConfig
from lamina_jax.models import ModelConfig, Storage, build, initialise
from lamina_jax.server.listener import listen
from lamina_jax.weights.export import save_checkpoint

TINY = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=128,
    dtype="float32",
)
FEW_PROGRAMS = {"placement": "collocated", "max_num_seqs": 1, "max_model_len": 64, "page_size": 8}
START_SECONDS = 200.0
"""Importing jax and compiling takes seconds, and a minute where the machine is busy."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = build(TINY, Storage(jnp.dtype(TINY.dtype)))
    initialise(model, seed=0, std=0.4)
    save_checkpoint(model, TINY, folder)
    tokenizer().inner.save(str(folder / "tokenizer.json"))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lamina_jax.serve", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, where it ends by itself."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=START_SECONDS, check=False
    )


class Process:
    """The command in the background. What it prints is collected as it comes."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
        self.printed: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.printed.append(line)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert self.process.poll() is None, "".join(self.printed)
            assert time.monotonic() < deadline, "".join(self.printed)
            time.sleep(0.05)

    def url(self) -> str:
        """Where it says that it listens."""
        self.wait_for(lambda: bool(self.printed))
        found = re.match(r"listening on (http://127\.0\.0\.1:\d+), ", self.printed[0])
        assert found, self.printed
        return found[1]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        return code


@contextmanager
def background(*arguments: object) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait(10)


@pytest.mark.timeout(400)
def test_from_a_command_line_to_text_over_http(checkpoint: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FEW_PROGRAMS.items()]
    with background(checkpoint, "--port", 0, *flags) as server:
        with httpx.Client(base_url=server.url(), timeout=30) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 503
            expected = LLM(str(checkpoint), **FEW_PROGRAMS).generate(
                "abc", SamplingParams(max_tokens=20, temperature=0)
            )[0]
            server.wait_for(lambda: client.get("/ready").status_code == 200)

            body = {"model": str(checkpoint), "prompt": "abc", "max_tokens": 20, "temperature": 0}
            body |= {"return_token_ids": True}
            (choice,) = client.post("/v1/completions", json=body).json()["choices"]
            assert choice["token_ids"] == expected.outputs[0].token_ids
            assert choice["text"] == expected.outputs[0].text
            stats = client.get("/stats").json()
            assert stats["compilations_after_ready"] == 0
            assert stats["pages_free"] == stats["pages_total"]
        assert server.end(signal.SIGTERM) == 0
    printed = "".join(server.printed)
    assert "KV cache: 8 pages of 8 tokens" in printed
    assert re.search(r"^compiling \d+/\d+, \d+ s$", printed, re.MULTILINE)
    ready = rf"^ready: {server.url()} \({re.escape(str(checkpoint))}, collocated, 8 pages\) in [\d.]+ s$"
    assert re.search(ready, printed, re.MULTILINE)


@pytest.mark.timeout(400)
def test_ctrl_c_while_compiling(checkpoint: Path) -> None:
    with background(checkpoint, "--port", 0) as server:
        server.wait_for(lambda: any(line.startswith("compiling") for line in server.printed))
        started = time.monotonic()
        assert server.end(signal.SIGINT) == 0
        assert time.monotonic() - started < 5
    assert "Traceback" not in "".join(server.printed)


@pytest.mark.timeout(400)
def test_a_model_that_is_not_there_is_one_line() -> None:
    done = run("no/such/folder", "--port", 0)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "'no/such/folder'" in last
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_before_anything_is_loaded() -> None:
    with listen(ServerConfig(port=0)) as held:
        port = held.getsockname()[1]
        done = run("no/such/folder", "--port", port)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"port {port} " in line
    assert "--port" in line


def test_a_wrong_flag_is_one_line() -> None:
    done = run("--prot", 1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--prot" in line
