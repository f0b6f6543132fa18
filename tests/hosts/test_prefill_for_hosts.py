"""Prompts prefilled elsewhere for two compute hosts: each worker pulls into the pages of both."""

from __future__ import annotations

import random
import signal
import time

import pytest
from compute_hosts import Hosts
from prefill_process import HOST_SETTINGS, LONG_PROMPT, PrefillProcess, Traffic
from real_processes import MARGIN_SECONDS, NOTICED_SECONDS, Start, WorkerProcess
from worker_talk import until

from lamina_jax import LLM, SamplingParams

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]

WITHIN = NOTICED_SECONDS + MARGIN_SECONDS
LENGTHS = (2, 9, 41, len(LONG_PROMPT))
"""Within a page, around one, beyond a chunk, of many."""

TOKENS = 12


@pytest.fixture(scope="module")
def answers(checkpoint: str) -> dict[int, list[int]]:
    """The collocated model's, by the prompt's length."""
    llm = LLM(checkpoint, placement="collocated", **HOST_SETTINGS)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    outputs = llm.generate([LONG_PROMPT[:length] for length in LENGTHS], sampling)
    return {length: output.outputs[0].token_ids for length, output in zip(LENGTHS, outputs, strict=True)}


@pytest.fixture
def host(run: Start, checkpoint: str) -> PrefillProcess:
    return run(PrefillProcess, checkpoint)


def started(
    run: Start,
    checkpoint: str,
    workers: list[WorkerProcess],
    host: PrefillProcess,
    partition: str,
    exchange: str = "auto",
) -> Hosts:
    more = ("--partition", partition, "--exchange", exchange, "--prefill", host.address)
    hosts = Hosts(run, checkpoint, [worker.address for worker in workers], more=more)
    hosts.server.wait_ready()
    return hosts


@pytest.mark.parametrize(
    ("num_workers", "partition", "exchange"),
    [
        *((count, partition, "auto") for count in (1, 2) for partition in ("heads", "requests", "tokens")),
        (2, "tokens", "jax"),
    ],
)
def test_the_collocated_tokens(
    run: Start,
    checkpoint: str,
    workers: list[WorkerProcess],
    host: PrefillProcess,
    answers: dict[int, list[int]],
    num_workers: int,
    partition: str,
    exchange: str,
) -> None:
    server = started(run, checkpoint, workers[:num_workers], host, partition, exchange).server
    for length, answer in answers.items():
        assert server.complete(TOKENS, prompt=LONG_PROMPT[:length]) == answer
    stats = server.stats()
    assert stats["prefill_prompts"] == len(LENGTHS)
    assert stats["prefill_tokens"] == sum(LENGTHS) - len(LENGTHS)
    assert stats["prefill_retries"] == stats["prefill_fallbacks"] == 0
    assert stats["compilations_after_ready"] == 0
    assert server.pages_are_back()


def test_a_prefill_host_that_is_killed_and_requests_that_leave(
    run: Start,
    checkpoint: str,
    workers: list[WorkerProcess],
    host: PrefillProcess,
    answers: dict[int, list[int]],
) -> None:
    hosts = started(run, checkpoint, workers, host, "heads")
    server, rng = hosts.server, random.Random(3)
    traffic = Traffic(server, 10, TOKENS)
    for _ in range(12):
        with server.stream(prompt=LONG_PROMPT[: rng.randrange(2, len(LONG_PROMPT))]):
            time.sleep(rng.random() / 20)
    assert until(lambda: len(traffic.answers) >= 3, 60)
    host.send(signal.SIGKILL)
    traffic.join()
    assert traffic.answers == [answers[len(LONG_PROMPT)]] * 20
    assert until(server.pages_are_back)
    stats = server.stats()
    assert stats["prefill_hosts_up"] == 0
    assert stats["prefill_prompts"] >= 3
    assert stats["compilations_after_ready"] == 0


def test_a_worker_that_is_killed_while_it_pulls(
    run: Start, checkpoint: str, workers: list[WorkerProcess], host: PrefillProcess
) -> None:
    """All compute hosts end and name it, as they do without prefill hosts."""
    hosts = started(run, checkpoint, workers, host, "heads")
    host.send(signal.SIGSTOP)
    with hosts.server.stream(prompt=LONG_PROMPT) as events:
        began = time.monotonic()
        workers[1].send(signal.SIGKILL)  # on which host 0 has no lease
        *_, last = events
    assert time.monotonic() - began < WITHIN
    assert workers[1].address in last["error"]["message"]
    assert hosts.followers[0].exit_code(WITHIN) == 1
    assert hosts.server.exit_code() == 1
