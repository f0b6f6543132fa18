"""A server over a fake model whose tokens can be computed by hand, in a thread of the test."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lamina_jax.config import ServerConfig
from lamina_jax.core import Sampled
from lamina_jax.engine.engine import Engine
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.engine.scheduler_config import SchedulerConfig
from lamina_jax.server.api_keys import read_keys
from lamina_jax.server.engine_loop import Build, EngineLoop
from lamina_jax.server.lifecycle import Server
from lamina_jax.server.listener import listen, url
from lamina_jax.testing import FakeModel, FakeRunner
from lamina_jax.weights.chat_template import ChatTemplate
from lamina_jax.weights.tokenizer import Tokenizer

MODEL = FakeModel(vocab_size=96)
MAX_MODEL_LEN = 128
MAX_PROMPT = 64
NUM_PAGES = 32
DEADLINE = 20.0
"""Seconds after which a test gives up waiting."""

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ bos_token }}{{ message.role }}:{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
"""Of the fake checkpoint, whose bos token is "$"."""


def conversation(*contents: str) -> str:
    """The prompt of contents that user and assistant take turns in."""
    roles = ("user", "assistant")
    return "".join(f"${roles[i % 2]}:{content}" for i, content in enumerate(contents)) + ">"


def tokenizer() -> Tokenizer:
    """One token for each of 96 characters: the blank is 0, "!" is 1, and so on."""
    vocab = {chr(32 + i): i for i in range(MODEL.vocab_size)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner, ChatTemplate(TEMPLATE, {"bos_token": "$"}))


def token_ids(text: str) -> list[int]:
    return [ord(character) - 32 for character in text]


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(32 + token) for token in token_ids)


def continuation(prompt: str, max_tokens: int) -> str:
    """What the fake model says."""
    return text_of(MODEL.generate(token_ids(prompt), max_tokens))


class GatedRunner(FakeRunner):
    """A fake runner that reads a step only while its gate is open; `fault` is raised instead.

    `reading` is set once the engine waits at the gate.
    """

    def __init__(self) -> None:
        super().__init__(MODEL, num_pages=NUM_PAGES, page_size=8)
        self.gate, self.reading = threading.Event(), threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.step_seconds = 0.0

    def read(self, step: list[np.ndarray]) -> list[Sampled]:
        self.reading.set()
        time.sleep(self.step_seconds)
        assert self.gate.wait(DEADLINE), "the test never opened the gate"
        if self.fault is not None:
            raise self.fault
        return super().read(step)


@dataclass
class FakeEngine:
    """Builds an engine over a runner, of which the test keeps hold."""

    runner: ModelRunner = field(default_factory=GatedRunner)
    with_tokenizer: bool = True
    eos_token_ids: tuple[int, ...] = ()
    before: Callable[[Callable[[str, int, int], None]], None] = lambda report: report("compiling", 2, 2)
    """Called first with `report`, to be slow or to fail."""

    def build(self, report: Callable[[str, int, int], None]) -> Engine:
        self.before(report)
        limits = SchedulerConfig(
            vocab_size=MODEL.vocab_size,
            num_pages=NUM_PAGES,
            page_size=8,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            microbatches=1,
            decode_buckets=(4,),
            prefill_buckets=((1, MAX_PROMPT),),
        )
        return Engine(
            Scheduler(limits),
            self.runner,
            tokenizer=tokenizer() if self.with_tokenizer else None,
            eos_token_ids=self.eos_token_ids,
            vocab_size=MODEL.vocab_size,
            facts={"placement": "fake", "max_model_len": MAX_MODEL_LEN},
        )


class EngineThread(threading.Thread):
    """An `EngineHost` that is a thread of the test."""

    def __init__(self, build: Build) -> None:
        self.connection, theirs = socket.socketpair()
        super().__init__(target=EngineLoop(build, theirs).run, name="engine", daemon=True)
        self.start()

    def ended(self) -> str | None:
        return None if self.is_alive() else "has ended"

    def kill(self) -> None:
        """Let nobody be at the other end; the thread sees it between two steps."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Running:
    """A server in a thread, and its engine in another. `code` is its exit code once it has ended."""

    engine: EngineThread
    server: Server
    client: httpx.Client
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    code: int | None = None

    def stop(self) -> None:
        """Have the server end, unless it has."""
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.server.stop)

    def wait_ended(self) -> int | None:
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the server does not end"
        return self.code

    def wait_for(
        self, path: str, condition: Callable[[httpx.Response], bool], seconds: float = DEADLINE
    ) -> httpx.Response:
        """Ask until the answer satisfies the condition."""
        deadline = time.monotonic() + seconds
        while not condition(response := self.client.get(path)):
            assert time.monotonic() < deadline, f"{path} still says {response.status_code} {response.text}"
            time.sleep(0.02)
        return response

    def wait_ready(self, seconds: float = DEADLINE) -> None:
        self.wait_for("/ready", lambda response: response.status_code == 200, seconds)

    def complete(self, prompt: Any = "abc", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "fake", "prompt": prompt} | fields)

    def chat(self, *contents: Any, **fields: Any) -> httpx.Response:
        """With contents that user and assistant take turns in."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        return self.client.post("/v1/chat/completions", json={"model": "fake", "messages": messages} | fields)


def sse(text: str) -> list[Any]:
    """The events of a stream: JSON objects, and "[DONE]" as it is."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Runs it beside the test; its result, once the thread has ended."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def pages_are_back(response: httpx.Response) -> bool:
    stats = response.json()
    return stats["pages_free"] == NUM_PAGES and not stats["requests_running"] + stats["requests_waiting"]


@contextmanager
def running(
    build: Build,
    *,
    ready: bool = True,
    model: str = "fake",
    load_tokenizer: Callable[[], Tokenizer | None] = tokenizer,
    **settings: Any,
) -> Iterator[Running]:
    """A server on a free port; it has ended when the block is left."""
    config = ServerConfig(port=0, **settings)
    listener = listen(config)
    engine = EngineThread(build)
    server = Server(engine, load_tokenizer, model, config, read_keys(config.api_key_file))
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    with httpx.Client(base_url=url(listener), timeout=DEADLINE) as client:

        def serve() -> None:
            with runner:
                found.code = runner.run(server.run(listener))

        found = Running(engine, server, client, threading.Thread(target=serve), runner.get_loop())
        found.thread.start()
        try:
            if ready:
                found.wait_ready()
            yield found
        finally:
            found.stop()
            found.wait_ended()
            assert not engine.is_alive() or not ready


@pytest.fixture(scope="module")
def fake() -> Iterator[Running]:
    """One server for all tests of a module that leave it as it was."""
    with running(FakeEngine().build) as server:
        yield server
