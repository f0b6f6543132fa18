"""Prefills one prompt after the other with the collocated model, and copies its KV out to main memory.

The model's pages are a scratch that every prompt begins anew: what has been copied out is read by workers
while the next chunk, or the next prompt, is computed. It knows nothing of gRPC or sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lamina_jax.compilation import Compilation
from lamina_jax.config import EngineConfig, SecurityConfig
from lamina_jax.core import Request, SamplingParams, StepPlan
from lamina_jax.engine.build import build_engine
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.prefill import choose_bucket, plan_prefill
from lamina_jax.engine.rows import LiveRequest
from lamina_jax.prefill.prompts import Prompt, Prompts
from pallas_kernels import Pages, read_stored

log = logging.getLogger(__name__)

GREEDY = SamplingParams(max_tokens=1, temperature=0)


class Prefiller:
    """The model, ready.

    Args:
        config: of an engine; what it says of workers and of decoding has no meaning here.

    Attributes:
        max_tokens: longest prompt.
        vocab_size: V.

    Raises:
        ConfigError: a setting that cannot be obeyed.
        CheckpointError: a folder that cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        engine = build_engine(collocated(config))
        assert isinstance(engine.runner, CollocatedRunner)
        self._runner, self._limits = engine.runner, engine.scheduler.config
        self.max_tokens, self.vocab_size = self._limits.max_model_len, engine.vocab_size
        self._copies = {
            queries: _copy_program(self._runner.pages, queries) for _, queries in self._limits.prefill_buckets
        }
        for copy in self._copies.values():
            copy.compile()

    def run(self, prompts: Prompts) -> None:
        """Prefill what comes until `prompts` are closed."""
        while (prompt := prompts.next()) is not None:
            self.prefill(prompt)
            del prompt  # whose KV may be let go while the thread waits

    def prefill(self, prompt: Prompt) -> None:
        """Compute the KV of a prompt; returns when it is kept, or at the end of a chunk if it is over."""
        under_way: tuple[Any, int] | None = None
        for chunk in self._chunks(prompt):
            if under_way:
                _keep(prompt, *under_way)  # while this chunk is computed
            under_way = chunk
            if prompt.over.is_set():
                return
        if under_way:
            _keep(prompt, *under_way)

    def _chunks(self, prompt: Prompt) -> Iterator[tuple[Any, int]]:
        """Queue a chunk; what pages will hold of it, and its tokens."""
        tokens, limits = prompt.tokens.tolist(), self._limits
        request = Request(request_id="prompt", prompt_token_ids=tuple(tokens), sampling=GREEDY)
        pages = list(range(-(-len(tokens) // limits.page_size)))
        live = LiveRequest(request, max_tokens=1, pages=pages)
        while live.prefilled < len(tokens):
            start = live.prefilled
            bucket = choose_bucket(limits, [len(tokens) - start], decoding=False)
            plan = plan_prefill(0, [live], bucket, limits)
            plan = replace(plan, samples=np.zeros_like(plan.samples), sampling=None)
            self._runner.dispatch(StepPlan(step=0, microbatches=(plan,)))
            slots = np.minimum(plan.slots[0], limits.padding_slot - 1)
            yield self._copies[bucket[1]](self._runner.pages, slots), live.prefilled - start


def collocated(config: EngineConfig) -> EngineConfig:
    """The engine whose prefill programs a prefill host runs: one request at a time, on this host alone."""
    return replace(
        config,
        placement="collocated",
        max_num_seqs=1,
        num_pages=None,
        microbatches=1,
        overlap="auto",
        memory_devices=None,
        attention=None,
        partition="heads",
        exchange="auto",
        coordinator=None,
        num_hosts=None,
        host_id=None,
        prefill=None,
        timings=False,
        trace=None,
        security=SecurityConfig(),
    )


def _keep(prompt: Prompt, layers: Any, count: int) -> None:
    prompt.keep([[np.asarray(array) for array in jax.tree.leaves(layer)] for layer in layers], count)


def _copy_program(pages: list[Pages], tokens: int) -> Compilation:
    """What `tokens` slots of every layer hold."""

    def like(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

    def copy(pages: list[Pages], slots: jax.Array) -> list[Any]:
        return [read_stored(layer, slots) for layer in pages]

    return Compilation(copy, (jax.tree.map(like, pages), jax.ShapeDtypeStruct((tokens,), np.int32)))
