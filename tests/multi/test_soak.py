"""Three minutes of constant load on a server and two workers: nothing on any of them grows."""

from __future__ import annotations

import random
import statistics
import threading
import time

import pytest
from real_processes import VOCABULARY, Process, ServeProcess, WorkerProcess

pytestmark = [pytest.mark.load, pytest.mark.timeout(600)]

WARM_UP_SECONDS, SOAK_SECONDS = 30.0, 180.0
MOST_GROWTH = {"rss_kb": 6_000, "descriptors": 0, "threads": 0}
"""From the median of the first third to that of the last."""

LENGTHS = (1, 5, 20, 70, 130)


def test_nothing_grows(server: ServeProcess, workers: list[WorkerProcess]) -> None:
    over, failed, served = threading.Event(), [], []

    def load(seed: int) -> None:
        chance = random.Random(seed)
        while not over.is_set():
            prompt = [chance.randrange(VOCABULARY) for _ in range(chance.choice(LENGTHS))]
            try:
                served.append(len(server.complete(chance.choice((1, 8, 25)), prompt=prompt)))
            except Exception as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    processes: dict[str, Process] = {"server": server, "worker 0": workers[0], "worker 1": workers[1]}
    time.sleep(WARM_UP_SECONDS)
    samples = []
    began = time.monotonic()
    while time.monotonic() - began < SOAK_SECONDS and not failed:
        samples.append({name: process.sizes() for name, process in processes.items()})
        time.sleep(1.0)
    over.set()
    for thread in threads:
        thread.join(60)
    assert not failed, failed
    third = len(samples) // 3
    for name in processes:
        for what, most in MOST_GROWTH.items():
            first, last = (
                statistics.median(sample[name][what] for sample in part)
                for part in (samples[:third], samples[-third:])
            )
            print(f"{name}: {what} {first:.0f} -> {last:.0f}")
            assert last - first <= most, f"{name}: {what} {first} -> {last}"
    print(f"{len(served)} requests, {sum(served)} tokens")
    assert server.pages_are_back()
    assert server.stats()["compilations_after_ready"] == 0
