"""500 streams at once: none is dropped, and memory is bounded."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fake_server import MODEL
from live_server import LiveServer
from real_processes import Start

from lamina_jax.benchmarks.load_client import send_all
from lamina_jax.benchmarks.workload import made_up, with_prompts

pytestmark = [pytest.mark.load, pytest.mark.timeout(600)]

STREAMS, TOKENS, WAVES = 500, 24, 3
MOST_MB = 100.0
"""More than before the first wave, at any time."""

GROWTH_MB = 15.0
"""More after the last wave than after the first: what one leaves behind, the next uses again."""


def test_none_is_dropped_and_memory_is_bounded(run: Start, checkpoint: str) -> None:
    server: LiveServer = run(LiveServer, checkpoint, max_num_seqs=32)
    random = np.random.default_rng(0)
    shapes = made_up(STREAMS, (1, 60), (TOKENS, TOKENS), random)
    requests = with_prompts(shapes, MODEL.vocab_size, random)
    before, after, most = server.memory_mb(), [], 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.1):
            most = max(most, server.memory_mb())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        for _ in range(WAVES):
            records, seconds = send_all(server.target(), requests)
            assert [record.error for record in records if record.error is not None] == []
            assert {record.output_tokens for record in records} == {TOKENS}
            server.check_idle()
            after.append(server.memory_mb())
            print(
                f"{STREAMS * TOKENS / seconds:.0f} tokens/s; {after[-1] - before:+.1f} MB since it is ready"
            )
    finally:
        over.set()
        watching.join(10)
    print(f"at most {most - before:+.1f} MB")
    assert most - before < MOST_MB
    assert after[-1] - after[0] < GROWTH_MB
