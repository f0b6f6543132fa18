"""A client that does not read costs what its answer is long, and holds nobody else."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from fake_server import DEADLINE, FakeEngine, Running, continuation, pages_are_back, running

CHOICES, LENGTH = 8, 120
MODEL = "fake" * 8000
"""Every chunk says it, so that what is not read is more than sockets hold."""


@contextmanager
def unread_stream(server: Running) -> Iterator[socket.socket]:
    """The connection of a client that has asked for all that fits, and reads nothing yet."""
    body = json.dumps(
        {"model": MODEL, "prompt": "a", "n": CHOICES, "max_tokens": LENGTH, "stream": True, "temperature": 0}
    )
    head = [
        "POST /v1/completions HTTP/1.1",
        "host: localhost",
        "connection: close",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(DEADLINE)
        client.connect((server.client.base_url.host, server.client.base_url.port))
        client.sendall("\r\n".join([*head, "", body]).encode())
        yield client


def texts(answer: str) -> tuple[list[str], int]:
    """What each choice said, and in how many chunks all was told."""
    chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    said = [""] * CHOICES
    for chunk in chunks:
        said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    return said, len(chunks)


def test_who_does_not_read_holds_nobody_and_misses_nothing() -> None:
    with running(FakeEngine().build, model=MODEL) as server, unread_stream(server) as client:
        for _ in range(3):
            body = {"model": MODEL, "prompt": "b", "max_tokens": 9}
            assert server.client.post("/v1/completions", json=body).status_code == 200
        server.wait_for("/stats", pages_are_back)  # the engine has done its part
        (call,) = server.server._service._calls.values()
        assert sum(len(news.outputs) for news in call._news.values()) <= CHOICES
        answer = b"".join(iter(lambda: client.recv(2**20), b"")).decode()
        said, chunks = texts(answer)
        assert said == [continuation("a", LENGTH)] * CHOICES
        assert chunks < CHOICES * LENGTH, "nothing was put together"
        assert "[DONE]" in answer


def test_who_never_reads_is_left_at_the_end() -> None:
    with running(FakeEngine().build, model=MODEL, drain_seconds=0.2) as server, unread_stream(server):
        server.wait_for("/stats", lambda response: response.json()["steps"] > LENGTH)
        server.stop()
        assert server.wait_ended() == 0
