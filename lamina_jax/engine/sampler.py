"""The compiled programs behind the last slice: which of them a microbatch needs, and their inputs.

It knows nothing of how logits come about; what is computed stands in `lamina_jax.engine.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from lamina_jax.compilation import Compilation, Job
from lamina_jax.core import LogitEdits, MicrobatchPlan, Sampled, SamplingRows, TokenLogprobs
from lamina_jax.engine import sampling
from lamina_jax.engine.sampling_rows import MAX_BIASED, history_sizes
from lamina_jax.engine.world import placed

PROMPT_ROWS = 64
"""Places of a prompt whose logits are looked at together."""

_ROWS_AT_ONCE = 4
"""On a CPU. A program that needs more than 32 MB for a moment gets it as fresh pages on every call, and
spends longer on page faults than on sampling."""


class Chosen(NamedTuple):
    """What a microbatch is given, on the device: tokens int32[rows], perhaps log-probabilities [B]."""

    tokens: jax.Array
    logprobs: sampling.Logprobs | None


class Sampler:
    """Chooses the tokens of microbatches.

    Args:
        place: where logits and tokens live: replicated over the compute mesh.
        rows: most rows of a microbatch: how many tokens are handed back.
        max_model_len: most tokens of a request.
    """

    def __init__(self, place: Sharding, rows: int, max_model_len: int) -> None:
        self._place, self._rows, self._widths = place, rows, history_sizes(max_model_len)
        device = next(iter(place.device_set))
        self._on_cpu = isinstance(device, jax.Device) and device.platform == "cpu"
        self._programs: dict[tuple[str, int, int], Compilation] = {}
        self._nothing_fed = cache(lambda size: placed(np.full(size, -1, np.int32), place))
        self.programs_queued = 0

    @property
    def programs(self) -> Collection[Compilation]:
        """All that there are jobs for so far."""
        return self._programs.values()

    def __call__(self, plan: MicrobatchPlan, logits: jax.Array, fed: jax.Array) -> Chosen:
        """Queue what chooses the next tokens of a microbatch.

        Args:
            logits: f32[max(B, 4), V].
            fed: int32[T]: the step's new tokens.
        """
        rows, wanted = logits.shape[0], plan.sampling
        if wanted is None:
            return Chosen(self._run("greedy", rows, logits), None)
        names = ("temperature", "top_k", "top_p", "min_p", "uniform")
        host = _arrays(wanted, names, rows), _arrays(wanted.edits, LogitEdits.__annotations__, rows)
        settings, edits = placed(host, self._place)
        edited = logits
        if edits:
            fed = fed if plan.kind == "decode" else self._nothing_fed(rows)
            edited = self._run("edit", rows, logits, fed, *edits, width=edits[0].shape[1])
        tokens = self._run("sample", rows, edited, *settings)
        return Chosen(tokens, self._run("logprobs", rows, logits, tokens) if wanted.logprobs else None)

    def prompt_logprobs(self, logits: jax.Array, targets: np.ndarray) -> sampling.Logprobs:
        """Queue the log-probabilities of int32[PROMPT_ROWS] prompt tokens under logits [PROMPT_ROWS, V]."""
        return self._run("prompt", PROMPT_ROWS, logits, placed(targets, self._place))

    def jobs(self, rows: int, vocab: int) -> Iterator[Job]:
        """What compiles the programs for logits f32[rows, V]."""
        floats, ints, logits = self._like(rows), self._like(rows, dtype=np.int32), self._like(rows, vocab)
        size, group = self._rows, math.gcd(rows, _ROWS_AT_ONCE) if self._on_cpu else None
        choose = partial(sampling.sample, size=size, group=group)
        yield from self._job("greedy", rows, partial(sampling.greedy, size=size), logits)
        yield from self._job("sample", rows, choose, logits, floats, ints, floats, floats, floats)
        tokens = self._like(size, dtype=np.int32)
        yield from self._job("logprobs", rows, partial(sampling.logprobs, group=group), logits, tokens)
        for width in self._widths:
            history, ids = (
                self._like(rows, width, dtype=np.int32),
                self._like(rows, MAX_BIASED, dtype=np.int32),
            )
            biases = ids, self._like(rows, MAX_BIASED)
            inputs = (logits, ints, history, floats, floats, floats, *biases)
            yield from self._job("edit", rows, sampling.edit_logits, *inputs, width=width)

    def prompt_jobs(self, vocab: int) -> Iterator[Job]:
        """What compiles the program for the logits of prompts."""
        inputs = self._like(PROMPT_ROWS, vocab), self._like(PROMPT_ROWS, dtype=np.int32)
        function = partial(sampling.logprobs, group=_ROWS_AT_ONCE if self._on_cpu else None)
        yield from self._job("prompt", PROMPT_ROWS, function, *inputs)

    def _run(self, kind: str, rows: int, *inputs: Any, width: int = 0) -> Any:
        self.programs_queued += 1
        return self._programs[kind, rows, width](*inputs)

    def _job(
        self, kind: str, rows: int, function: Callable[..., Any], *inputs: Any, width: int = 0
    ) -> Iterator[Job]:
        key = (kind, rows, width)
        if key not in self._programs:
            self._programs[key] = Compilation(function, inputs)
            yield f"sampler ({kind}) {rows}", self._programs[key].compile

    def _like(self, *shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._place)


def prompt_blocks(plan: MicrobatchPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For PROMPT_ROWS of the T new tokens after the others: their places, and the tokens that follow them."""
    assert plan.prompt_targets is not None
    size = plan.prompt_targets.size
    for start in range(0, size, PROMPT_ROWS):
        places = np.minimum(np.arange(start, start + PROMPT_ROWS, dtype=np.int32), size - 1)
        yield places, plan.prompt_targets[places]


def sampled(plan: MicrobatchPlan, chosen: Chosen | None, prompt: list[sampling.Logprobs]) -> Sampled:
    """On the host what came of a microbatch; waits for it. Without `chosen` no row samples.

    `prompt`: the log-probabilities of PROMPT_ROWS places each, in order.
    """
    rows, targets = plan.bucket[0], plan.prompt_targets
    return Sampled(
        tokens=np.zeros(rows, np.int32) if chosen is None else np.asarray(chosen.tokens)[:rows],
        logprobs=_on_host([chosen.logprobs], rows) if chosen and chosen.logprobs else None,
        prompt_logprobs=None if targets is None else _on_host(prompt, targets.size),
    )


def _on_host(parts: list[sampling.Logprobs], size: int) -> TokenLogprobs:
    arrays = [np.concatenate(field)[:size] for field in zip(*jax.device_get(parts), strict=True)]
    return TokenLogprobs(**dict(zip(sampling.Logprobs._fields, arrays, strict=True)))


def _arrays(source: SamplingRows | LogitEdits | None, names: Any, rows: int) -> tuple[np.ndarray, ...]:
    return () if source is None else tuple([_padded(getattr(source, name), rows) for name in names])


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """Zeros behind a microbatch of fewer rows than its logits have; what comes of them is not looked at."""
    if len(array) == rows:
        return array
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
