"""A compute host that runs engines one after the other, all in one JAX world: JSON lines in and out.

`python host_of_engines.py HOST`: a line on stdin has the settings of an engine, and batches of prompts with
how to sample each. Host 0 answers with a line of tokens and statistics, the others with an empty one; an
error is a line, too, and the end.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import jax
import numpy as np
from worker_talk import until

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import EngineConfig
from lamina_jax.engine.build import run_follower
from lamina_jax.engine.engine import Engine
from lamina_jax.hosts.alarm import Alarm

Batches = list[tuple[list[list[int]], list[dict[str, Any]]]]
"""Each of prompts, and of sampling parameters for each of these."""


def answer(settings: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """The tokens of every batch, and the engine's statistics after each, its followers' among them.

    Between two batches requests come and are aborted.
    """
    tokens, stats = [], []
    with LLM(**settings) as llm:
        for prompts, sampling in batches:
            outputs = llm.generate(prompts, [SamplingParams(**each) for each in sampling])
            tokens.append([output.outputs[0].token_ids for output in outputs])
            until(lambda: len({wire_of(host) for host in hosts_of(llm)}) == 1)
            stats.append({**llm.stats(), "hosts": [wire_of(host) for host in hosts_of(llm)]})
            abort_at_random(llm.engine, prompts)
    return {"tokens": tokens, "stats": stats}


def abort_at_random(engine: Engine, prompts: list[list[int]]) -> None:
    rng = np.random.default_rng(len(prompts))
    for i in range(12):
        engine.submit(engine.request(f"r{i}", prompts[i % len(prompts)], SamplingParams(max_tokens=4)))
        for _ in range(rng.integers(4)):
            engine.step()
        engine.abort(f"r{rng.integers(max(0, i - 3), i + 1)}")
    while engine.has_work:
        engine.step()
    engine.scheduler.check_idle()


def hosts_of(llm: LLM) -> list[dict[str, float]]:
    """The row of each compute host; of one host there is no other."""
    stats = llm.stats()
    rows: list[dict[str, float]] = stats.get("compute_hosts", [stats])
    return rows


def wire_of(host: dict[str, float]) -> tuple[float, ...]:
    """Bytes, messages and bytes of metadata of a step: the same on all hosts, when all have told."""
    return tuple(host[f"wire_{what}_per_step"] for what in ("bytes", "messages", "metadata_bytes"))


def stay_in_one_world() -> None:
    """JAX enters a world once in a process's life: engines after the first are in it already."""
    initialize = jax.distributed.initialize

    def enter(*place: Any, **options: Any) -> None:
        if not jax.distributed.is_initialized():
            initialize(*place, **options)

    jax.distributed.initialize = enter


def main(host: int) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # gloo writes to stdout
    stay_in_one_world()
    for line in sys.stdin:
        told = json.loads(line)
        settings = told["settings"] | {"host_id": host}
        found: dict[str, Any] = {}
        try:
            if host:
                run_follower(EngineConfig(**settings), Alarm())
            else:
                found = answer(settings, told["batches"])
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)
        if "error" in found:
            break
    os._exit(0)  # JAX would wait for the other hosts


if __name__ == "__main__":
    main(int(sys.argv[1]))
