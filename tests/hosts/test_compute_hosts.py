"""Real compute hosts over real workers: the collocated tokens, every kind of death."""

from __future__ import annotations

import os
import signal
import time

import pytest
from compute_hosts import FollowerProcess, Hosts
from real_processes import (
    LONG,
    MARGIN_SECONDS,
    NOTICED_SECONDS,
    SETTINGS,
    Process,
    ServeProcess,
    Start,
    WorkerProcess,
)
from worker_talk import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]

WITHIN = NOTICED_SECONDS + MARGIN_SECONDS


def test_the_collocated_tokens(hosts: Hosts, workers: list[WorkerProcess], expected: list[int]) -> None:
    """Of the real server, whose follower lags for a moment; test_every_way_over_hosts has the exchanges."""
    (follower,) = hosts.followers
    with hosts.server.stream() as events:
        chunks = [next(events)]
        follower.send(signal.SIGSTOP)
        time.sleep(0.5)
        follower.send(signal.SIGCONT)
        chunks += events
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == expected
    assert hosts.server.pages_are_back()
    stats = hosts.server.stats()
    assert stats["compilations_after_ready"] == 0
    assert [row["host_id"] for row in stats["compute_hosts"]] == [0, 1]
    hosts.server.send(signal.SIGTERM)
    assert hosts.server.exit_code() == 0, hosts.server.said
    assert hosts.followers[0].exit_code() == 0, hosts.followers[0].said
    for worker in workers:
        worker.is_free_within(5)


def test_requests_at_once_and_one_that_leaves(hosts: Hosts, expected: list[int]) -> None:
    with hosts.server.stream() as one, hosts.server.stream() as other:
        next(one)
        next(other)
    assert until(hosts.server.pages_are_back)
    assert hosts.server.complete(16) == expected[:16]
    sampled = {"temperature": 1.0, "seed": 7, "logprobs": 1}
    assert hosts.server.complete(16, **sampled) == hosts.server.complete(16, **sampled)


@pytest.mark.parametrize(
    ("number", "hosts"),
    [(signal.SIGKILL, "jax"), (signal.SIGSTOP, "auto")],
    ids=["killed-jax", "stopped-auto"],
    indirect=["hosts"],
)
def test_a_follower_that_is_lost(hosts: Hosts, workers: list[WorkerProcess], number: signal.Signals) -> None:
    (follower,) = hosts.followers
    with hosts.server.stream() as events:
        next(events)
        began = time.monotonic()
        follower.send(number)
        *_, last = events
    noticed = time.monotonic() - began
    print(f"{number.name} of a follower: noticed after {noticed:.2f} s: {last}")
    assert noticed < WITHIN
    assert "compute host 1" in last["error"]["message"]
    assert hosts.server.exit_code() == 1
    assert "compute host 1" in hosts.server.said
    if number is signal.SIGSTOP:  # and is killed by whoever started it
        follower.send(signal.SIGKILL)
    follower.exit_code()
    for worker in workers:
        worker.is_free_within(WITHIN)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_leader_that_is_lost(hosts: Hosts, number: signal.Signals, *, busy: bool) -> None:
    (follower,) = hosts.followers
    engine = hosts.server.engine
    if busy:
        with hosts.server.stream() as events:
            next(events)
            began = time.monotonic()
            os.kill(engine, number)
            code = follower.exit_code(WITHIN)
            os.kill(engine, signal.SIGCONT) if number is signal.SIGSTOP else None
            *_, last = events
            assert "error" in last
    else:
        began = time.monotonic()
        os.kill(engine, number)
        code = follower.exit_code(WITHIN)
        os.kill(engine, signal.SIGCONT) if number is signal.SIGSTOP else None
    print(f"{number.name} of the leader: noticed after {time.monotonic() - began:.2f} s")
    assert code != 0  # 1, unless JAX's own client was quicker to abort
    assert "compute host 0 at 127.0.0.1" in follower.said
    assert hosts.server.exit_code() == 1, hosts.server.said


@pytest.mark.parametrize(
    ("number", "hosts"),
    [(signal.SIGKILL, "auto"), (signal.SIGSTOP, "jax")],
    ids=["killed-auto", "stopped-jax"],
    indirect=["hosts"],
)
def test_a_worker_that_is_lost(
    run: Start,
    checkpoint: str,
    expected: list[int],
    hosts: Hosts,
    workers: list[WorkerProcess],
    number: signal.Signals,
) -> None:
    """And what a launcher does then: everything again."""
    (follower,) = hosts.followers
    with hosts.server.stream() as events:
        next(events)
        began = time.monotonic()
        workers[1].send(number)
        *_, last = events
        assert follower.exit_code(WITHIN) == 1
    print(f"{number.name} of a worker: noticed after {time.monotonic() - began:.2f} s: {last}")
    assert time.monotonic() - began < WITHIN
    assert workers[1].address in last["error"]["message"]
    assert workers[1].address in follower.said
    assert hosts.server.exit_code() == 1
    workers[1].close()
    workers[0].is_free_within(WITHIN)

    again = Hosts(run, checkpoint, [workers[0].address])
    again.server.wait_ready()
    assert again.server.complete(LONG) == expected


def test_two_hosts_with_one_id_and_a_missing_one(
    run: Start, checkpoint: str, workers: list[WorkerProcess]
) -> None:
    attention = [worker.address for worker in workers]
    more = ("--worker-wait-seconds", "15")
    hosts = Hosts(run, checkpoint, attention, num_hosts=3, ids=(1, 1), more=more)
    assert until(lambda: any(f.popen.poll() is not None for f in hosts.followers), 60)
    (refused,) = (f for f in hosts.followers if f.popen.poll() is not None)
    assert refused.exit_code() == 1
    assert "host_id=1 is taken, by " in refused.said
    assert hosts.server.exit_code(60) == 1
    assert "compute host 2 of 3 has not joined within 15 s" in hosts.server.said
    (other,) = (f for f in hosts.followers if f is not refused)
    assert other.exit_code(WITHIN) == 1
    assert "compute host 0 at 127.0.0.1" in other.said


def test_no_coordinator(run: Start, checkpoint: str) -> None:
    place = ("--coordinator", "127.0.0.1:9", "--num-hosts", "2", "--host-id", "1")
    follower: Process = run(
        FollowerProcess, checkpoint, ["127.0.0.1:8"], *place, "--worker-wait-seconds", "1"
    )
    assert follower.exit_code(60) == 1
    assert "there is no compute host 0 at coordinator=127.0.0.1:9" in follower.said


def test_settings_that_differ_are_named(run: Start, checkpoint: str, workers: list[WorkerProcess]) -> None:
    attention = [worker.address for worker in workers]
    hosts = Hosts(run, checkpoint, attention, ids=())
    follower = run(
        FollowerProcess, checkpoint, attention, *hosts.flags, "--host-id", "1", "--page-size", "16"
    )
    assert follower.exit_code(60) == 1
    assert f"page_size is 16 there, and {SETTINGS['page_size']} on host 0" in follower.said
    assert hosts.server.popen.poll() is None


def test_a_follower_waits_for_host_0_at_a_signal(hosts: Hosts) -> None:
    """As when a scheduler ends all processes at once, and host 0 still answers."""
    server: ServeProcess = hosts.server
    (follower,) = hosts.followers
    with server.stream() as events:
        next(events)
        follower.send(signal.SIGTERM)
        server.popen.send_signal(signal.SIGTERM)
        *_, last = events
        assert last["choices"][0]["finish_reason"] == "length"
    assert server.exit_code() == 0
    assert follower.exit_code() == 0
