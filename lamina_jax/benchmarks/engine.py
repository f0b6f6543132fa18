"""The engine's own time: tokens/s with a model that takes none.

Everything but the model is that of a real engine: the queue, the scheduler, the bookkeeping of outputs and
the bundled model's tokenizer. The fake model's tokens can be computed by hand, and are checked. A figure is
the median over rounds in which all settings have their turn, on one core.
Seconds are those of this process's CPU time: it never waits, and others on the machine do not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import in_turn
from lamina_jax.benchmarks.table import format_table
from lamina_jax.core import Request, RequestOutput, SamplingParams, StepPlan
from lamina_jax.engine.engine import Engine
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.engine.scheduler_config import SchedulerConfig
from lamina_jax.testing import QuickModel, QuickRunner
from lamina_jax.weights.tokenizer import Tokenizer

BATCHES = (8, 64, 256)
PROMPT = 16
MAX_MODEL_LEN = 4096

TEXT = (
    "The memory side holds the cache of keys and values, and the compute side holds the weights. While one "
    "part of a batch is on its way, the other one is worked on; so both sides always have something to do. "
)
"""Its tokens, in another order, are what the model says."""

SETTINGS: dict[str, dict[str, Any]] = {
    "token ids": {},
    "text": {},
    "text, a stop string": {"stop": "never said"},
    "text, 5 log-probabilities": {"logprobs": 5},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "three rounds of 32 tokens per request", rounds=3, tokens=32)
    parser.add_argument("--rounds", type=int, default=7, help="timings of each setting")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each request")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    rounds, count = args.rounds, args.tokens
    tokenizer = Tokenizer.from_folder(Path(str(resources.files("lamina_jax") / "data" / "bundled")))
    model = QuickModel(np.array(tokenizer.encode(TEXT, special_tokens=False), np.int32))
    timed: dict[tuple[str, int], Callable[[], float]] = {
        (name, batch): _whole(model, None if name == "token ids" else tokenizer, batch, count, sampling)
        for name, sampling in SETTINGS.items()
        for batch in BATCHES
    }
    timed[SCHEDULER] = lambda: scheduler_alone(model, BATCHES[-1], count)
    cores = os.sched_getaffinity(0)
    with ExitStack() as ends:
        ends.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {max(cores)})
        seconds = in_turn(timed, rounds)
    speeds = {setting: setting[1] * count / statistics.median(taken) for setting, taken in seconds.items()}
    print(f"\ntokens/s of the engine with a model that takes no time; core {max(cores)}, median of {rounds}")
    print(table(speeds))
    return [
        {"setting": name, "batch": batch, "tokens_per_second": speed}
        for (name, batch), speed in speeds.items()
    ]


SCHEDULER = ("schedule() + update() alone", BATCHES[-1])


def table(speeds: dict[tuple[str, int], float]) -> str:
    """A row for each setting, a column for each batch."""
    rows = [
        [name, *(f"{speeds[name, batch]:,.0f}" if (name, batch) in speeds else "" for batch in BATCHES)]
        for name in dict.fromkeys(name for name, _ in speeds)
    ]
    return format_table(["", *(f"batch {batch}" for batch in BATCHES)], rows)


def config_for(batch: int, vocab_size: int) -> SchedulerConfig:
    """One microbatch of `batch` rows, and pages enough."""
    return SchedulerConfig(
        vocab_size=vocab_size,
        num_pages=batch * MAX_MODEL_LEN // 64,
        page_size=64,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=batch,
        microbatches=1,
        decode_buckets=(batch,),
        prefill_buckets=((min(batch, 32), PROMPT),),
    )


def prompts_for(model: QuickModel, batch: int) -> np.ndarray:
    """int32[batch, `PROMPT`]: ids that the model knows, another one at each end."""
    return model.words[np.add.outer(np.arange(batch), np.arange(PROMPT)) % len(model.words)]


def _whole(
    model: QuickModel, tokenizer: Tokenizer | None, batch: int, count: int, sampling: dict[str, Any]
) -> Callable[[], float]:
    """One run of an engine, from the first request to the last token: the seconds it took."""
    params = SamplingParams(max_tokens=count, temperature=0, **sampling)
    prompts = prompts_for(model, batch)
    expected = model.generate(prompts, count).tolist()
    vocab_size = int(model.words.max()) + 1
    requests = [
        Request(request_id=str(row), prompt_token_ids=tuple(prompt), sampling=params)
        for row, prompt in enumerate(prompts.tolist())
    ]

    def once() -> float:
        scheduler = Scheduler(config_for(batch, vocab_size))
        engine = Engine(
            scheduler, QuickRunner(model), tokenizer=tokenizer, eos_token_ids=(), vocab_size=vocab_size
        )
        told: list[list[RequestOutput]] = []
        started = time.process_time()
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            told.append(engine.step())
        seconds = time.process_time() - started
        outputs = {request.request_id: RequestOutput(request_id=request.request_id) for request in requests}
        for new in (new for news in told for new in news):
            outputs[new.request_id].extend(new)
        if [output.outputs[0].token_ids for output in outputs.values()] != expected:
            raise SystemExit("the engine's tokens are not the model's: this figure would be worth nothing")
        return seconds

    return once


def scheduler_alone(model: QuickModel, batch: int, count: int) -> float:
    """Seconds in `schedule()` and `update()` while `batch` requests get `count` tokens each."""
    scheduler = Scheduler(config_for(batch, int(model.words.max()) + 1))
    runner = QuickRunner(model)
    params = SamplingParams(max_tokens=count, temperature=0)
    for row, prompt in enumerate(prompts_for(model, batch).tolist()):
        scheduler.add(Request(request_id=str(row), prompt_token_ids=tuple(prompt), sampling=params))
    in_flight: deque[tuple[StepPlan, list[np.ndarray]]] = deque()
    seconds = 0.0
    while scheduler.has_work:
        started = time.process_time()
        plan = scheduler.schedule()
        seconds += time.process_time() - started
        if plan is not None:
            in_flight.append((plan, [result.tokens for result in runner.dispatch(plan)]))
        if plan is None or len(in_flight) > 1:
            done, tokens = in_flight.popleft()
            started = time.process_time()
            scheduler.update(done, tokens)
            seconds += time.process_time() - started
    if scheduler.generation_tokens != batch * count:
        raise SystemExit(f"{scheduler.generation_tokens} tokens were counted, not {batch * count}")
    return seconds
