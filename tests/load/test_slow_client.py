"""A client that does not read holds nobody else, and gets all of its text once it does."""

from __future__ import annotations

import json
import socket
import statistics
import time
from typing import Any

import httpx
import numpy as np
import pytest
from fake_server import MODEL
from live_server import LiveServer
from real_processes import Start

from lamina_jax.benchmarks.latencies import summary
from lamina_jax.benchmarks.load_client import send_all
from lamina_jax.benchmarks.workload import made_up, with_prompts

pytestmark = [pytest.mark.load, pytest.mark.timeout(600)]

OTHERS, TOKENS = 32, 100
CHOICES, LONG = 16, 200
MOST_SLOWDOWN = 2.5
"""The others' time per token, of what it is while the slow client is not there. It takes a third of the rows,
with all that is dear to tell, and the machine is noisy; to be held up would take many times as long."""

READ_SECONDS = 60.0


def test_others_are_not_held_up(run: Start, checkpoint: str) -> None:
    server: LiveServer = run(LiveServer, checkpoint, max_num_seqs=OTHERS + CHOICES)
    random = np.random.default_rng(1)
    requests = with_prompts(made_up(OTHERS, (8, 8), (TOKENS, TOKENS), random), MODEL.vocab_size, random)

    def time_per_token() -> float:
        records, seconds = send_all(server.target(), requests)
        figures = summary(records, seconds)
        assert figures["requests_ok"] == OTHERS, figures
        return figures["tpot_ms"]["p50"]

    time_per_token()
    without = statistics.median(time_per_token() for _ in range(3))
    slow = open_without_reading(server, body(server))
    with slow:
        beside = time_per_token()
        later = statistics.median(time_per_token() for _ in range(3))
        text = read_all(slow)
    print(f"ms per token: {without:.1f} alone, {beside:.1f} at first and {later:.1f} later beside it")
    assert beside < MOST_SLOWDOWN * without
    assert later < MOST_SLOWDOWN * without
    whole = server.http.post("/v1/completions", json=body(server) | {"stream": False}).json()
    assert text == {choice["index"]: (choice["text"], "length") for choice in whole["choices"]}
    server.check_idle()


def body(server: LiveServer) -> dict[str, Any]:
    """Asks for several megabytes: more than what lies between the two sides may hold."""
    sampling = {"n": CHOICES, "temperature": 1.0, "seed": 9, "max_tokens": LONG, "logprobs": 20}
    return {"model": server.model, "prompt": [5, 6, 7], "stream": True, "ignore_eos": True} | sampling


def open_without_reading(server: LiveServer, asked: dict[str, Any]) -> socket.socket:
    """A connection whose request was sent, with room for little of the answer."""
    url = httpx.URL(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(READ_SECONDS)
    connection.connect((url.host, url.port))
    content = json.dumps(asked).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def read_all(connection: socket.socket) -> dict[int, tuple[str, str | None]]:
    """(text, finish reason) of each choice."""
    received, deadline = bytearray(), time.monotonic() + READ_SECONDS
    while part := connection.recv(65536):
        received += part
        assert time.monotonic() < deadline
    print(f"{len(received) / 1e6:.1f} MB")
    head, _, chunked = bytes(received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    events = [line[6:] for line in _unchunked(chunked).split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    texts: dict[int, tuple[str, str | None]] = {}
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            text, _ = texts.get(choice["index"], ("", None))
            texts[choice["index"]] = (text + choice["text"], choice["finish_reason"])
    return texts


def _unchunked(data: bytes) -> bytes:
    """The content of an answer in chunks, each after its length."""
    content, rest = bytearray(), data
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        content += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return bytes(content)
