"""The rows of decode microbatches as arrays: requests on one side, `MicrobatchPlan`s on the other.

It owns the layout of rows, positions, slots and feedback. It knows nothing of admission, of when
pages are taken and given back, of devices or jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lamina_jax.core import MicrobatchPlan, Request, SamplingRows
from lamina_jax.engine.sampling_rows import SampledRow, sampling_rows
from lamina_jax.engine.scheduler_config import SchedulerConfig


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that the scheduler holds.

    Attributes:
        request: what was asked.
        num_pages: pages reserved for it when it is admitted.
        to_plan: tokens that may still be planned.
        planned: tokens that were planned so far.
        prefilled: prompt tokens that were planned so far.
        to_read: tokens that may still be read; steps in flight make it larger than `to_plan`.
        pages: its pages in order of position.
        generated: the tokens that were read so far.
        last_step: the last step that names it.
        ended: it is finished or aborted: what steps in flight still bring for it is dropped.
    """

    request: Request
    num_pages: int
    to_plan: int
    to_read: int
    planned: int = 0
    prefilled: int = 0
    pages: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    last_step: int = -1
    ended: bool = False

    def name_in(self, step: int) -> None:
        """One more token of this request is planned, in `step`."""
        self.to_plan -= 1
        self.planned += 1
        self.last_step = step

    def sampled_row(self) -> SampledRow:
        """What the sampler's arrays are made from, for the next token to be planned.

        The newest token is this step's own input, perhaps not read yet: the history goes without it.
        """
        known = self.generated[: max(0, self.planned - 1)]
        return SampledRow(request=self.request, index=self.planned, generated=known)


class DecodeRows:
    """The rows of one decode microbatch: `requests[b]` is row b, one new token per row and step.

    The arrays are kept from step to step and copied into each plan. Beyond the live rows they hold
    what a padding row holds, so a plan is a copy of the first rows of each.
    """

    def __init__(self, microbatch: int, config: SchedulerConfig) -> None:
        rows = config.decode_buckets[-1]
        self.requests: list[LiveRequest] = []
        self._microbatch = microbatch
        self._config = config
        self._step, self._plain = -1, True
        self._block_tables = np.zeros((rows, config.table_width), np.int32)
        self._context_lens = np.zeros(rows, np.int32)
        self._tokens = np.zeros(rows, np.int32)
        self._feedback = np.full(rows, -1, np.int32)
        self._rows = _read_only(np.arange(rows, dtype=np.int32))
        self._page_index = _read_only(page_places(rows, config))

    def join(self, request: LiveRequest, token: int) -> None:
        """Add a row for a request whose prompt is cached and whose next token is known to the host."""
        row = len(self.requests)
        self.requests.append(request)
        self._block_tables[row, : len(request.pages)] = request.pages
        self._context_lens[row] = len(request.request.prompt_token_ids)
        self._tokens[row] = token
        self._plain = self._plain and request.request.sampling.plain

    def pack(self) -> None:
        """Drop the rows that need no further step; the others move up and keep their order."""
        keep = [row for row, request in enumerate(self.requests) if request.to_plan and not request.ended]
        live, before = len(keep), len(self.requests)
        if live == before:
            return
        for array, padding in (
            (self._block_tables, 0),
            (self._context_lens, 0),
            (self._tokens, 0),
            (self._feedback, -1),
        ):
            array[:live] = array[keep]
            array[live:before] = padding
        self.requests = [self.requests[row] for row in keep]
        self._plain = all(request.request.sampling.plain for request in self.requests)

    def plan(self, step: int) -> MicrobatchPlan | None:
        """The next token of every row, or None if there are no rows. Shapes are those of a bucket."""
        self.pack()
        live = len(self.requests)
        if not live:
            return None
        rows = next(bucket for bucket in self._config.decode_buckets if bucket >= live)
        plan = MicrobatchPlan(
            microbatch=self._microbatch,
            kind="decode",
            request_ids=tuple([request.request.request_id for request in self.requests]),
            tokens=self._tokens[:rows, None].copy(),
            feedback=self._feedback[:rows].copy(),
            positions=self._context_lens[:rows, None].copy(),
            context_lens=self._context_lens[:rows].copy(),
            block_tables=self._block_tables[:rows].copy(),
            page_index=self._page_index[:rows],
            slots=self._slots(live, rows),
            logits_at=self._rows[:rows],
            cached=True,
            samples=self._rows[:rows] < live,
            sampling=None if self._plain else self._sampling(rows),
        )
        self._context_lens[:live] += 1
        self._tokens[:live] = 0
        self._feedback[:live] = self._rows[:live]
        self._step = step
        for request in self.requests:
            request.name_in(step)
        return plan

    def read(self, step: int, tokens: np.ndarray) -> None:
        """The tokens int32[B] that `step` chose are known: rows not planned since take them from the host."""
        if step != self._step:
            return
        feedback = self._feedback[: len(self.requests)]
        unread = feedback >= 0
        self._tokens[: len(feedback)][unread] = tokens[feedback[unread]]
        feedback[unread] = -1

    def _sampling(self, rows: int) -> SamplingRows | None:
        return sampling_rows(
            [request.sampled_row() for request in self.requests],
            rows,
            vocab_size=self._config.vocab_size,
            history=self._config.max_model_len,
        )

    def _slots(self, live: int, rows: int) -> np.ndarray:
        """int32[B, 1]: where each row's new token is kept."""
        slots = np.full((rows, 1), self._config.padding_slot, np.int32)
        place, offset = np.divmod(self._context_lens[:live], self._config.page_size)
        slots[:live, 0] = self._block_tables[self._rows[:live], place] * self._config.page_size + offset
        return slots


def page_places(rows: int, config: SchedulerConfig) -> np.ndarray:
    """int32[rows, M]: 0, 1, 2, ... in every row: one worker holds all pages of a request."""
    return np.tile(np.arange(config.table_width, dtype=np.int32), (rows, 1))


def _read_only(array: np.ndarray) -> np.ndarray:
    """Plans of many steps share this array, so nobody may write to it."""
    array.setflags(write=False)
    return array
