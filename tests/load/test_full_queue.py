"""More requests than may wait: those above the bound hear so at once, the rest are served."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from fake_server import MODEL
from live_server import LiveServer
from real_processes import Start

from lamina_jax.benchmarks.load_client import send_all
from lamina_jax.benchmarks.workload import made_up, with_prompts

pytestmark = [pytest.mark.load, pytest.mark.timeout(600)]

SEATS, WAITING, REQUESTS, TOKENS = 4, 16, 100, 60


@pytest.fixture
def server(run: Start, checkpoint: str) -> LiveServer:
    started: LiveServer = run(LiveServer, checkpoint, max_num_seqs=SEATS, max_waiting=WAITING)
    return started


def test_the_rest_are_served(server: LiveServer) -> None:
    random = np.random.default_rng(0)
    shapes = made_up(REQUESTS, (1, 30), (TOKENS, TOKENS), random)
    records, _ = send_all(server.target(), with_prompts(shapes, MODEL.vocab_size, random))
    served = [record for record in records if record.error is None]
    assert {record.error for record in records} == {None, "HTTP 429 queue_full"}
    assert WAITING <= len(served) < REQUESTS
    assert {record.output_tokens for record in served} == {TOKENS}
    server.check_idle()
    again, _ = send_all(server.target(), with_prompts(shapes, MODEL.vocab_size, random)[:WAITING])
    assert [record.error for record in again] == [None] * WAITING
    server.check_idle()


def test_who_is_refused_is_told_when_to_come_back(server: LiveServer) -> None:
    body = server.body(200, seed=1)

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(3 * WAITING) as pool:
        answers = list(pool.map(post, range(3 * WAITING)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        assert str(WAITING) in answer.json()["error"]["message"]
    server.check_idle()
