"""200 requests at random through HTTP, a third of them left by their clients, with too few pages for all:
each that is not left gets what it gets alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from live_server import FEW_PROGRAMS, LiveServer
from real_processes import Start, WorkerProcess
from traffic import Answer, Case, alone, cases, send

from lamina_jax import LLM

pytestmark = [pytest.mark.load, pytest.mark.timeout(900)]

REQUESTS, RATE, SEED = 200, 60.0, 6
SEATS = 48
SETTINGS: dict[str, Any] = FEW_PROGRAMS | {"page_size": 4}
"""Small pages: a request grows by many, so that those in flight outgrow the pool."""

TRAFFIC_SECONDS = 240.0


@pytest.fixture(scope="module")
def traffic() -> list[Case]:
    return cases(REQUESTS, RATE, SEED)


@pytest.fixture(scope="module")
def num_pages(traffic: list[Case]) -> int:
    """For a third of those that have seats, if each took its longest."""
    pages = [-(-case.tokens // SETTINGS["page_size"]) for case in traffic]
    return SEATS * sum(pages) // len(pages) // 3


@pytest.fixture(scope="module")
def expected(checkpoint: str, traffic: list[Case]) -> list[Answer | None]:
    """What each gets alone, of a collocated model; None where its client leaves."""
    settings = SETTINGS | {"max_num_seqs": 4, "placement": "collocated"}
    with LLM(checkpoint, **settings) as llm:
        return [alone(llm, case) if case.leaves == "never" else None for case in traffic]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_gets_what_it_gets_alone(
    run: Start,
    checkpoint: str,
    traffic: list[Case],
    num_pages: int,
    expected: list[Answer | None],
    workers: int,
) -> None:
    """`workers`: attention workers; 0: all in the engine's process."""
    there = [run(WorkerProcess) for _ in range(workers)]
    where = {"attention": ",".join(worker.wait_listening().address for worker in there)} if workers else {}
    settings = SETTINGS | {"max_num_seqs": SEATS, "num_pages": num_pages} | where
    server: LiveServer = run(LiveServer, checkpoint, **settings)
    answers, most = asyncio.run(_send_all(server, traffic))
    for case, answer, wanted in zip(traffic, answers, expected, strict=True):
        if wanted is not None:
            assert answer == wanted, case
    print(f"{num_pages} pages; at most: {most}; at the end: {server.stats()}")
    assert most["requests_waiting"] > 0, "there was room for all: the test shows nothing"
    assert most["pages_used"] > 0.8 * num_pages
    assert server.stats()["preemptions"] > 0
    server.check_idle()


async def _send_all(server: LiveServer, traffic: list[Case]) -> tuple[list[Answer | None], dict[str, int]]:
    """The answers, and the most that was seen of some counters."""
    most = {"requests_running": 0, "requests_waiting": 0, "pages_used": 0}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def watch() -> None:
            while True:
                async with session.get(f"{server.url}/stats") as response:
                    stats = await response.json()
                most.update({name: max(value, stats[name]) for name, value in most.items()})
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(TRAFFIC_SECONDS):
            sends = [send(session, server.url, server.model, case) for case in traffic]
            answers = await asyncio.gather(*sends)
        watching.cancel()
    return answers, most
