"""One live server with the bundled model for all tests here, in a thread, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import openai
import pytest
from fake_server import Running, running

from lamina_jax.config import EngineConfig
from lamina_jax.hosts.alarm import Alarm
from lamina_jax.server.engine_process import build
from lamina_jax.server.messages import Start
from lamina_jax.weights.hub import find_model
from lamina_jax.weights.tokenizer import Tokenizer

START_SECONDS = 200
"""Compiling takes a minute where the machine is busy."""

FEW_PROGRAMS = EngineConfig(
    max_num_seqs=4,
    max_model_len=128,
    max_prefill_tokens=32,
    dtype="float32",
    compute_devices="cpu:0",
    memory_devices="cpu:1",
)


@pytest.fixture(scope="session")
def live() -> Iterator[Running]:
    tokenizer = Tokenizer.from_folder(find_model("bundled"))
    with running(
        partial(build, Start(FEW_PROGRAMS), Alarm()),
        ready=False,
        model="bundled",
        load_tokenizer=lambda: tokenizer,
    ) as server:
        server.wait_ready(START_SECONDS)
        yield server


@pytest.fixture
def client(live: Running) -> Iterator[openai.OpenAI]:
    url = str(live.client.base_url.join("/v1"))
    with openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
        yield client
