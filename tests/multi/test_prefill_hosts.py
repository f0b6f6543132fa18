"""A real server over two workers and a prefill host, of which one is killed."""

from __future__ import annotations

import signal

import pytest
from prefill_process import LONG_PROMPT, PrefillProcess, Traffic
from real_processes import MARGIN_SECONDS, ServeProcess, Start, WorkerProcess
from worker_talk import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]

TOKENS = 12


@pytest.fixture
def host(run: Start, checkpoint: str) -> PrefillProcess:
    return run(PrefillProcess, checkpoint)


@pytest.fixture
def server(run: Start, checkpoint: str, workers: list[WorkerProcess], host: PrefillProcess) -> ServeProcess:
    """Ready, over both workers, by token."""
    attention = [worker.address for worker in workers]
    more = ("--partition", "tokens", "--prefill", host.address)
    started: ServeProcess = run(ServeProcess, checkpoint, attention, *more)
    started.wait_ready()
    return started


def test_a_prefill_host_that_is_killed_costs_no_token(server: ServeProcess, host: PrefillProcess) -> None:
    """In the middle of its prompts; and the host before that has served the same."""
    expected = server.complete(TOKENS, prompt=LONG_PROMPT)
    assert server.stats()["prefill_prompts"] == 1
    traffic = Traffic(server, 8, TOKENS)
    assert until(lambda: len(traffic.answers) >= 3, 60)
    host.send(signal.SIGKILL)
    traffic.join()
    assert traffic.answers == [expected] * 16
    stats = server.stats()
    assert stats["prefill_hosts_up"] == 0
    assert stats["prefill_prompts"] >= 3
    assert until(server.pages_are_back)
    assert stats["compilations_after_ready"] == 0


def test_a_prefill_host_that_is_stopped_holds_nobody_up_for_long(
    server: ServeProcess, host: PrefillProcess
) -> None:
    """Cut off without a word, as a network does it."""
    expected = server.complete(TOKENS, prompt=LONG_PROMPT)
    host.send(signal.SIGSTOP)
    assert server.complete(TOKENS, prompt=LONG_PROMPT) == expected
    assert server.complete(TOKENS, prompt=LONG_PROMPT) == expected
    assert server.stats()["prefill_hosts_up"] == 0
    host.send(signal.SIGCONT)
    assert until(lambda: server.stats()["prefill_hosts_up"] == 1, 30)
    assert server.complete(TOKENS, prompt=LONG_PROMPT) == expected


def test_a_worker_that_is_killed_while_it_pulls(
    run: Start, server: ServeProcess, workers: list[WorkerProcess]
) -> None:
    """What ran ends as it does without prefill hosts; the worker that comes back is used."""
    expected = server.complete(TOKENS, prompt=LONG_PROMPT)
    traffic = Traffic(server, 6, TOKENS)
    assert until(lambda: len(traffic.answers) >= 2, 60)
    workers[1].close()
    run(WorkerProcess, "127.0.0.1", workers[1].port).wait_listening()
    traffic.join()
    assert len(traffic.answers) == 12
    assert all(answer in (expected, "worker_lost") for answer in traffic.answers)
    assert traffic.answers.count("worker_lost") <= 2
    assert until(lambda: server.ready().status_code == 200, 30 + MARGIN_SECONDS)
    assert server.complete(TOKENS, prompt=LONG_PROMPT) == expected
    assert until(server.pages_are_back)
