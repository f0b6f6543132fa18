"""The serve and attend commands as processes over a tiny checkpoint, for tests of what becomes of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from tiny_models import TINY
from worker_talk import until

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import SecurityConfig
from lamina_jax.exchange.control import WorkerClient

START_SECONDS = 100.0
NOTICED_SECONDS = 3.0
"""What is promised."""
MARGIN_SECONDS = 2.0
"""What a busy machine gets on top."""

SETTINGS: dict[str, Any] = {
    "page_size": 8,
    "max_num_seqs": 2,
    "max_model_len": 160,
    "max_prefill_tokens": 20,
    "num_pages": 48,
    "microbatches": 1,
    "overlap": "on",
    "compute_devices": "cpu:0",
    "prefill_stall_ms": float("inf"),
}
"""Few programs to compile."""

VOCABULARY = TINY.vocab_size
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
LONG = 140
"""Tokens that take a while."""


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


class Process:
    """A command, its lines on stderr kept."""

    def __init__(self, *command: str) -> None:
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with self.popen.stderr as stream:
            self.lines.extend(stream)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def find(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches."""
        assert until(lambda: re.search(pattern, self.said) or self.popen.poll() is not None, START_SECONDS)
        found = re.search(pattern, self.said)
        assert found, self.said
        return found

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def exit_code(self, seconds: float = 20.0) -> int:
        code = self.popen.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait(10)
        self._reader.join(10)

    def sizes(self) -> dict[str, int]:
        """What must not grow: KB of memory, descriptors, threads."""
        return sizes_of(self.popen.pid)


def sizes_of(pid: int) -> dict[str, int]:
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "descriptors": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def children_of(pid: int) -> list[int]:
    """Processes that its main thread has started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class WorkerProcess(Process):
    """An attention worker with one device, on `host`; port 0 takes any."""

    program: tuple[str, ...] = ("-m", "lamina_jax.attend")

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *more: str, before: Sequence[str] = ()
    ) -> None:
        listen = ("--listen", f"{host}:{port}")
        super().__init__(*before, sys.executable, *self.program, *listen, "--devices", "cpu:0", *more)
        self.host, self.port = host, port

    def wait_listening(self) -> WorkerProcess:
        found = self.find(r"listening on .* \(port (\d+), data port (\d+)")
        self.port, self.data_port = int(found[1]), int(found[2])
        return self

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def held_by(self) -> str:
        """The engine that has it."""
        client = WorkerClient(self.address, SecurityConfig())
        try:
            return client.describe().held_by
        finally:
            client.close()

    def is_free_within(self, seconds: float) -> float:
        """How long it takes until no engine has it."""
        began = time.monotonic()
        client = WorkerClient(self.address, SecurityConfig())
        try:
            assert until(lambda: client.describe().held_by == "", seconds), client.describe().held_by
        finally:
            client.close()
        return time.monotonic() - began


class ServeProcess(Process):
    """The server over workers, on any port of 127.0.0.1, and its engine's process."""

    def __init__(self, checkpoint: str, attention: Sequence[str], *more: str) -> None:
        where = ("--port", "0", "--attention", ",".join(attention))
        command = (sys.executable, "-m", "lamina_jax.serve", checkpoint, *flags(SETTINGS), *where, *more)
        super().__init__(*command)
        self.model = checkpoint

    @property
    def engine(self) -> int:
        """The process that holds the workers."""
        (child,) = children_of(self.popen.pid)
        return child

    def send(self, number: signal.Signals) -> None:
        """A signal that stops, or ends a stop, is for both."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            for child in children_of(self.popen.pid):
                os.kill(child, number)
        super().send(number)

    def sizes(self) -> dict[str, int]:
        """Of both together."""
        engine = sizes_of(self.engine)
        return {what: size + engine[what] for what, size in super().sizes().items()}

    def wait_listening(self) -> ServeProcess:
        url = self.find(r"listening on (http://\S+:\d+)")[1]
        self.http = httpx.Client(base_url=url, timeout=60)
        return self

    def wait_ready(self, seconds: float = START_SECONDS) -> float:
        """Seconds until it is."""
        began = time.monotonic()
        if not hasattr(self, "http"):
            self.wait_listening()
        try:
            ready = until(lambda: self.popen.poll() is not None or self.ready().status_code == 200, seconds)
        except httpx.TransportError as error:
            raise AssertionError(self.said) from error
        assert self.popen.poll() is None, self.said
        assert ready, self.said
        return time.monotonic() - began

    def ready(self) -> httpx.Response:
        return self.http.get("/ready")

    def body(self, max_tokens: int, prompt: Sequence[int] = PROMPT, **more: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": list(prompt), "temperature": 0, "max_tokens": max_tokens}
        return body | {"return_token_ids": True, "ignore_eos": True} | more

    def complete(self, max_tokens: int = 16, **more: Any) -> list[int]:
        """Tokens."""
        answer = self.http.post("/v1/completions", json=self.body(max_tokens, **more))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    @contextmanager
    def stream(self, max_tokens: int = LONG, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of one request."""
        body = self.body(max_tokens, stream=True, **more)
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            yield (json.loads(line) for line in lines if line != "[DONE]")

    def stats(self) -> dict[str, Any]:
        return self.http.get("/stats").json()

    def pages_are_back(self) -> bool:
        stats = self.stats()
        return stats["pages_free"] == stats["pages_total"]

    def close(self) -> None:
        super().close()
        if hasattr(self, "http"):
            self.http.close()


def reference(checkpoint: str, max_tokens: int = LONG) -> list[int]:
    """The collocated model's continuation of PROMPT."""
    llm = LLM(checkpoint, placement="collocated", **SETTINGS)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return llm.generate([PROMPT], sampling)[0].outputs[0].token_ids


Start = Callable[..., Any]
