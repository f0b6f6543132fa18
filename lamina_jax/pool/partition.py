"""How attention workers share the KV cache, and what each of them is told of a step.

It turns the page ids and slots of the scheduler, which count over all workers, into those of each
worker. It knows nothing of requests, devices, messages or jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lamina_jax.core import MicrobatchPlan
from lamina_jax.pool.metadata import StepMetadata, metadata_of

PartitionKind = Literal["heads", "requests", "tokens"]
"""What is divided: the KV heads of every request, the requests, or the pages of each request."""


class Told(NamedTuple):
    """A worker that takes part in a microbatch: what it is told, and of which segment of the rows it is sent
    messages."""

    worker: int
    segment: int
    metadata: StepMetadata


class Held(NamedTuple):
    """A worker's part of a request: its own page ids, the place of the first of them in the request, and how
    many places further the next one is."""

    worker: int
    pages: list[int]
    first: int
    stride: int


@dataclass(frozen=True)
class Partition:
    """Page `id` of the scheduler is page id % num_pages of worker id // num_pages.

    Under "tokens" the pages of a request are dealt round: the worker after that of one page has the next.

    Args:
        kind: what is divided. Under "heads" page ids mean the same on every worker, so that there is one
            answer for all and `workers` is 1.
        workers: W.
        num_pages: pages of each worker.
        page_size: p, tokens per page.
    """

    kind: PartitionKind
    workers: int
    num_pages: int
    page_size: int

    @property
    def padding_slot(self) -> int:
        """The slot of a token that a worker does not keep: one past its pages."""
        return self.num_pages * self.page_size

    def table_width(self, pages_per_request: int) -> int:
        """The width of a worker's block tables, where a request has at most so many pages."""
        return -(-pages_per_request // self.workers) if self.kind == "tokens" else pages_per_request

    def split(self, plan: MicrobatchPlan) -> list[Told]:
        """Who takes part in a microbatch of B rows, in the order in which the next slice takes the answers.

        By "heads" there is one entry, for all workers. By "requests" a worker is told of its own B / W
        rows, a segment, or of all rows where `plan.worker` names it. By "tokens" each is told of all rows,
        with block tables of `table_width` places.
        """
        if self.kind == "heads":
            return [Told(0, 0, metadata_of(plan))]
        if self.kind == "tokens":
            return [Told(worker, 0, metadata) for worker, metadata in enumerate(self._dealt(plan))]
        if plan.worker is not None:
            return [Told(plan.worker, 0, self._rows(plan, plan.worker, slice(None)))]
        share = plan.bucket[0] // self.workers
        segments = [slice(w * share, (w + 1) * share) for w in range(self.workers)]
        return [Told(w, w, self._rows(plan, w, rows)) for w, rows in enumerate(segments)]

    def holders(self, pages: Sequence[int]) -> list[Held]:
        """Who holds the pages of a request, given in order of position. By "heads" one entry, for all."""
        if self.kind == "heads":
            return [Held(0, list(pages), 0, 1)]
        stride = self.workers if self.kind == "tokens" else 1
        return [
            Held(
                pages[first] // self.num_pages,
                [page % self.num_pages for page in pages[first::stride]],
                first,
                stride,
            )
            for first in range(min(stride, len(pages)))
        ]

    def kept(self, slots: np.ndarray) -> np.ndarray:
        """Indices into the flat T of the tokens that a worker keeps, by its own slots int32[B, Q]."""
        return np.flatnonzero(slots < self.padding_slot)

    def _rows(self, plan: MicrobatchPlan, worker: int, rows: slice) -> StepMetadata:
        """Rows whose requests are all on one worker."""
        # Places that hold no page are 0 among the scheduler's page ids, and among the worker's.
        return StepMetadata(
            np.maximum(plan.block_tables[rows] - worker * self.num_pages, 0),
            plan.context_lens[rows],
            plan.page_index[rows],
            plan.positions[rows],
            self._local_slots(plan.slots[rows], worker),
        )

    def _dealt(self, plan: MicrobatchPlan) -> list[StepMetadata]:
        """Every row for every worker, each with the places of its own pages: every W-th."""
        rows, places = plan.block_tables.shape
        width = self.table_width(places)
        padded = np.zeros((rows, width * self.workers), np.int32)
        padded[:, :places] = plan.block_tables
        workers = np.arange(self.workers, dtype=np.int32)
        first = (workers[:, None] - plan.block_tables[:, 0] // self.num_pages) % self.workers  # [W, B]
        tables = padded.reshape(rows, width, self.workers)[np.arange(rows), :, first]  # [W, B, M / W]
        tables = np.maximum(tables - workers[:, None, None] * self.num_pages, 0)
        page_index = first[:, :, None] + np.arange(0, width * self.workers, self.workers, dtype=np.int32)
        return [
            StepMetadata(
                tables[worker],
                plan.context_lens,
                page_index[worker],
                plan.positions,
                self._local_slots(plan.slots, worker),
            )
            for worker in range(self.workers)
        ]

    def _local_slots(self, slots: np.ndarray, worker: int) -> np.ndarray:
        """A worker's own slots; those of the others, and padding, become its padding slot."""
        # As unsigned numbers the slots of workers before it are beyond its own, like those behind it.
        local = (slots - worker * self.padding_slot).view(np.uint32)
        return np.minimum(local, np.uint32(self.padding_slot)).view(np.int32)
