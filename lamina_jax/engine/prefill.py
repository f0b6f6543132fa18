"""Prefill microbatches: which chunks of which requests share the next one, and its arrays.

A request is prefilled with all tokens that are known of it: its prompt and, after a preemption, what it
had generated.

It owns the choice of a bucket (B, Q) and the bound on how long running decodes wait for it. It knows
nothing of admission, of when pages are taken and given back, of devices or jax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamina_jax.core import MicrobatchPlan, SamplingRows
from lamina_jax.engine.rows import LiveRequest, page_places
from lamina_jax.engine.sampling_rows import sampling_rows
from lamina_jax.engine.scheduler_config import SchedulerConfig

STEP_TOKENS = 128
"""What a step costs beside its tokens, in tokens, as long as nobody has measured it."""


def choose_bucket(config: SchedulerConfig, lengths: Sequence[int], *, decoding: bool) -> tuple[int, int]:
    """The bucket (B, Q) that brings the most prompt tokens per second.

    Args:
        lengths: tokens still to be prefilled of each request, the first in the queue first.
        decoding: whether requests that decode wait meanwhile: then a bucket may take no longer than
            `config.prefill_stall`, or is the quickest there is.
    """
    costs = dict(zip(config.prefill_buckets, _costs(config), strict=True))
    allowed = list(costs)
    if decoding and config.prefill_seconds:
        allowed = [b for b in costs if costs[b] <= config.prefill_stall] or [
            min(costs, key=costs.__getitem__)
        ]

    def tokens(bucket: tuple[int, int]) -> int:
        rows, width = bucket
        return sum(min(width, length) for length in lengths[:rows])

    # Among equals the smaller Q: the local part of attention grows with its square.
    return max(allowed, key=lambda bucket: (tokens(bucket) / costs[bucket], tokens(bucket), -bucket[1]))


def _costs(config: SchedulerConfig) -> Sequence[float]:
    return config.prefill_seconds or [STEP_TOKENS + rows * width for rows, width in config.prefill_buckets]


def plan_prefill(
    step: int, requests: Sequence[LiveRequest], bucket: tuple[int, int], config: SchedulerConfig
) -> MicrobatchPlan:
    """The next chunk of each of `requests`, one a row, in a microbatch of `bucket` = (B, Q).

    By request, all of them are on one worker. Without any, all rows are padding.
    """
    rows, width = bucket
    by_request = config.partition == "requests"
    tokens = np.zeros((rows, width), np.int32)
    positions = np.zeros((rows, width), np.int32)
    slots = np.full((rows, width), config.padding_slot, np.int32)
    targets = np.full((rows, width), -1, np.int32)
    block_tables = np.zeros((rows, config.table_width), np.int32)
    context_lens = np.zeros(rows, np.int32)
    logits_at = np.zeros(rows, np.int32)
    samples = np.zeros(rows, bool)
    for row, request in enumerate(requests):
        start = request.prefilled
        chunk = request.tokens[start : start + width]
        count = len(chunk)
        position = np.arange(start, start + count, dtype=np.int32)
        place, offset = np.divmod(position, config.page_size)
        block_tables[row, : len(request.pages)] = request.pages
        context_lens[row] = start
        tokens[row, :count] = chunk
        positions[row] = start + count - 1  # of padding, too: from 0 it would see beyond any window
        positions[row, :count] = position
        slots[row, :count] = block_tables[row, place] * config.page_size + offset
        logits_at[row] = row * width + count - 1
        samples[row] = start + count == len(request.tokens)
        if request.request.sampling.prompt_logprobs is not None:
            first = max(start, request.told)
            following = request.request.prompt_token_ids[first + 1 : start + 1 + count]
            targets[row, first - start : first - start + len(following)] = following
    plan = MicrobatchPlan(
        microbatch=config.microbatches,
        kind="prefill",
        request_ids=tuple(request.request.request_id for request in requests),
        tokens=tokens,
        feedback=np.full(rows, -1, np.int32),
        positions=positions,
        context_lens=context_lens,
        block_tables=block_tables,
        page_index=page_places(rows, config),
        slots=slots,
        logits_at=logits_at,
        cached=bool(context_lens.any()),
        samples=samples,
        sampling=_sampling(requests, samples, config),
        prompt_targets=targets.reshape(-1) if (targets >= 0).any() else None,
        worker=next((request.worker for request in requests), 0) if by_request else None,
    )
    for row, request in enumerate(requests):
        request.prefilled = min(request.prefilled + width, len(request.tokens))
        request.told = max(request.told, request.prefilled)
        request.last_step = step
        if samples[row]:
            request.name_in(step)
    return plan


def _sampling(
    requests: Sequence[LiveRequest], samples: np.ndarray, config: SchedulerConfig
) -> SamplingRows | None:
    """For the rows whose prompts end here; what is drawn for the others is not read."""
    if all(request.request.sampling.plain for row, request in enumerate(requests) if samples[row]):
        return None
    rows = [request.sampled_row(request.planned) for request in requests]
    return sampling_rows(rows, len(samples), vocab_size=config.vocab_size, history=config.max_model_len)
