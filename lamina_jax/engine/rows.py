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
    """A request that the scheduler holds, in the queue or running.

    Attributes:
        request: what was asked.
        max_tokens: how many tokens it may generate.
        prompt_len: tokens of its prompt.
        arrival: its place among all requests in the order of their arrival.
        tokens: its prompt and the tokens that were read so far. Whoever is admitted prefills all of them:
            one that was preempted goes on where it was.
        planned: generated tokens that were planned so far; those of steps in flight are not read yet.
        prefilled: tokens that were planned to be prefilled since it was admitted.
        told: prompt tokens whose log-probabilities were planned to be told.
        pages: its pages in order of position.
        worker: the one that its first page is on.
        last_step: the last step that names it.
        errand: the one that brings its KV from elsewhere, while it does; None: none.
        running: it holds pages and a seat.
        ended: it is finished or aborted: what steps in flight still bring for it is dropped.
    """

    request: Request
    max_tokens: int
    prompt_len: int = field(init=False)
    arrival: int = 0
    tokens: list[int] = field(init=False)
    planned: int = 0
    prefilled: int = 0
    told: int = 0
    pages: list[int] = field(default_factory=list)
    worker: int = 0
    last_step: int = -1
    errand: int | None = None
    running: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.prompt_len = len(self.tokens)

    @property
    def most_cached(self) -> int:
        """Tokens that it can ever cache: the last one is never fed back.

        Nor is a token planned beyond `max_tokens` where a stop token is seen one step late.
        """
        return self.prompt_len + self.max_tokens - 1

    def name_in(self, step: int) -> None:
        """One more token of this request is planned, in `step`."""
        self.planned += 1
        self.last_step = step

    def sampled_row(self, known: int) -> SampledRow:
        """What the sampler's arrays are made from, for the next token to be planned.

        `known`: generated tokens that the history holds, which goes without a decode step's own input.
        """
        start = self.prompt_len
        return SampledRow(self.request, index=self.planned, generated=self.tokens[start : start + known])


Rows = tuple[LiveRequest | None, ...]
"""The request of each row of a microbatch; None: padding between live rows."""

PlannedMicrobatch = tuple[MicrobatchPlan, Rows]

Place = tuple[int, int]
"""(segment, row in it)."""


class DecodeRows:
    """The rows of one decode microbatch, one new token per row and step.

    The rows are `config.segments` equal parts; a request is in that of its worker. The arrays are kept
    from step to step, [segments, rows of each, ...], and copied into each plan. Beyond the live rows of a
    segment they hold what a padding row holds, so a plan is a copy of the first rows of each segment.
    """

    def __init__(self, microbatch: int, config: SchedulerConfig) -> None:
        self._segments: list[list[LiveRequest]] = [[] for _ in range(config.segments)]
        self._microbatch = microbatch
        self._config = config
        self._step, self._plain = -1, True
        self._rows_planned: tuple[Rows, tuple[str, ...]] | None = None  # until the rows change
        rows = config.decode_buckets[-1]
        shape = config.segments, rows // config.segments
        self._block_tables = np.zeros((*shape, config.table_width), np.int32)
        self._context_lens = np.zeros(shape, np.int32)
        self._capacity = np.ones(shape, np.int32)  # tokens that a row's pages hold
        self._tokens = np.zeros(shape, np.int32)
        self._feedback = np.full(shape, -1, np.int32)
        self._rows = _read_only(np.arange(rows, dtype=np.int32))
        self._page_index = _read_only(page_places(rows, config))

    def load(self, worker: int) -> tuple[int, int]:
        """Live rows beside which a request of `worker` would be: in its segment, and in all of them."""
        return len(self._segments[self._config.segment(worker)]), sum(map(len, self._segments))

    def join(self, request: LiveRequest) -> None:
        """Add a row for a request all of whose tokens are cached but the last."""
        self._rows_planned = None
        segment = self._config.segment(request.worker)
        row = segment, len(self._segments[segment])
        self._segments[segment].append(request)
        self._block_tables[row][: len(request.pages)] = request.pages
        self._capacity[row] = len(request.pages) * self._config.page_size
        self._context_lens[row] = len(request.tokens) - 1
        self._tokens[row] = request.tokens[-1]
        self._plain = self._plain and request.request.sampling.plain

    def pack(self) -> None:
        """Drop the rows that need no further step; those behind them in a segment move up in order."""
        dropped = [self._pack(segment) for segment in range(len(self._segments))]
        if any(dropped):
            self._plain = all(
                request.request.sampling.plain for requests in self._segments for request in requests
            )

    def growing(self) -> list[tuple[Place, LiveRequest]]:
        """The rows, packed, whose next token needs a page that they do not have yet."""
        places = np.argwhere(self._context_lens >= self._capacity).tolist()
        return [((segment, row), self._segments[segment][row]) for segment, row in places]

    def add_page(self, place: Place, page: int) -> None:
        """The next page of one of the rows that are `growing`."""
        self._block_tables[place][self._capacity[place] // self._config.page_size] = page
        self._capacity[place] += self._config.page_size

    def plan(self, step: int) -> PlannedMicrobatch | None:
        """The next token of every row, or None if there are no rows; none is `growing`.

        The rows are packed. Shapes are those of a bucket.
        """
        live = [len(requests) for requests in self._segments]
        if not any(live):
            return None
        segments = len(live)
        rows = next(bucket for bucket in self._config.decode_buckets if bucket >= segments * max(live))
        size = rows // segments
        if self._rows_planned is None:
            self._rows_planned = self._by_row(size)
        requests, request_ids = self._rows_planned
        samples = self._rows[:size] < np.array(live)[:, None]
        context_lens = self._context_lens[:, :size]
        plan = MicrobatchPlan(
            microbatch=self._microbatch,
            kind="decode",
            request_ids=request_ids,
            tokens=self._tokens[:, :size].flatten()[:, None],
            feedback=self._feedback[:, :size].flatten(),
            positions=context_lens.flatten()[:, None],
            context_lens=context_lens.flatten(),
            block_tables=self._block_tables[:, :size].flatten().reshape(rows, -1),
            page_index=self._page_index[:rows],
            slots=self._slots(samples),
            logits_at=self._rows[:rows],
            cached=True,
            samples=samples.flatten(),
            sampling=None if self._plain else self._sampling(requests, rows),
        )
        context_lens += samples
        self._tokens[:, :size] = 0
        self._feedback[:, :size] = np.where(samples, self._rows[:rows].reshape(segments, size), -1)
        self._step = step
        for request in requests:
            if request is not None:
                request.name_in(step)
        return plan, requests

    def read(self, step: int, tokens: np.ndarray) -> None:
        """The tokens int32[B] that `step` chose are known: rows not planned since take them from the host."""
        if step != self._step:
            return
        unread = self._feedback >= 0
        self._tokens[unread] = tokens[self._feedback[unread]]
        self._feedback[unread] = -1

    def _pack(self, segment: int) -> bool:
        """Whether a row was dropped."""
        requests = self._segments[segment]
        keep = [row for row, r in enumerate(requests) if r.running and r.planned < r.max_tokens]
        live, before = len(keep), len(requests)
        if live == before:
            return False
        for array, padding in (
            (self._block_tables, 0),
            (self._capacity, 1),
            (self._context_lens, 0),
            (self._tokens, 0),
            (self._feedback, -1),
        ):
            array[segment, :live] = array[segment, keep]
            array[segment, live:before] = padding
        self._segments[segment] = [requests[row] for row in keep]
        self._rows_planned = None
        return True

    def _by_row(self, size: int) -> tuple[Rows, tuple[str, ...]]:
        """The request of every row, where segments have `size` rows; None between, nothing behind them.

        And their ids.
        """
        rows: list[LiveRequest | None] = []
        for segment, requests in enumerate(self._segments):
            if requests:
                rows += [None] * (segment * size - len(rows))
                rows += requests
        return tuple(rows), tuple([row.request.request_id if row else "" for row in rows])

    def _sampling(self, requests: Rows, rows: int) -> SamplingRows | None:
        return sampling_rows(
            [request.sampled_row(request.planned - 1) if request else None for request in requests],
            rows,
            vocab_size=self._config.vocab_size,
            history=self._config.max_model_len,
        )

    def _slots(self, live: np.ndarray) -> np.ndarray:
        """int32[B, 1]: where each row's new token is kept; `live` is bool[segments, rows of each]."""
        size = live.shape[1]
        place, offset = np.divmod(self._context_lens[:, :size], self._config.page_size)
        pages = self._block_tables[np.arange(len(live))[:, None], self._rows[:size], place]
        slots = pages * self._config.page_size + offset
        slots[~live] = self._config.padding_slot
        return slots.reshape(-1, 1)


def page_places(rows: int, config: SchedulerConfig) -> np.ndarray:
    """int32[rows, M]: 0, 1, 2, ... in every row: the scheduler lists all pages of a request."""
    return np.tile(np.arange(config.table_width, dtype=np.int32), (rows, 1))


def _read_only(array: np.ndarray) -> np.ndarray:
    """Plans of many steps share this array, so nobody may write to it."""
    array.setflags(write=False)
    return array
