"""An engine in a process of its own, with no server around it, that notes when its steps yield tokens.

`python -m lamina_jax.benchmarks.engine_alone MODEL FLAGS` takes the server's flags of the engine. It builds
the engine, prints "ready" and then, for every line {"prompts": [[ids]], "max_tokens": n} that it reads from
stdin, submits all of them at once, steps until they have ended, and prints a line of JSON: for each request
"arrivals", seconds after the submission, and "counts", the tokens that came with each; and "cpu_seconds".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from lamina_jax.config import EngineConfig
from lamina_jax.core import SamplingParams
from lamina_jax.engine.build import build_engine
from lamina_jax.engine.engine import Engine
from lamina_jax.flags import add_flags, from_flags


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lamina_jax.benchmarks.engine_alone", description=__doc__)
    add_flags(parser, EngineConfig, positional="model")
    engine = build_engine(from_flags(EngineConfig, parser.parse_args()))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(engine, **json.loads(line))), flush=True)


def serve(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Continue prompts, each by `max_tokens` tokens; when they came."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    arrivals: list[list[float]] = [[] for _ in prompts]
    counts: list[list[int]] = [[] for _ in prompts]
    unfinished = len(prompts)
    cpu, began = time.process_time(), time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(engine.request(str(index), prompt, sampling))
    while unfinished:
        news = engine.step()
        now = time.perf_counter() - began
        for output in news:
            unfinished -= output.finished
            if count := sum(len(choice.token_ids) for choice in output.outputs):
                arrivals[int(output.request_id)].append(now)
                counts[int(output.request_id)].append(count)
    while engine.has_work:  # the overrun step of the last
        engine.step()
    return {"arrivals": arrivals, "counts": counts, "cpu_seconds": time.process_time() - cpu}


if __name__ == "__main__":
    main()
