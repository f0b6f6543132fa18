"""Admission: which waiting requests have room, and which workers hold them.

It owns seats, pages and the choice of workers. It knows nothing of steps, rows, devices or jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lamina_jax.engine.pages import PagePool
from lamina_jax.engine.rows import LiveRequest
from lamina_jax.engine.scheduler_config import SchedulerConfig


class Admission:
    """The seats and pages of all workers.

    Attributes:
        pages: the page pool.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.pages = PagePool(config.total_pages, config.page_size, config.workers)
        self._config = config
        self._running = [0] * config.segments

    @property
    def num_running(self) -> int:
        """Requests that were admitted and not released."""
        return sum(self._running)

    def admissible(self, waiting: Iterable[LiveRequest]) -> list[LiveRequest]:
        """Those from the head of the queue on that have room together, each with its `worker` set.

        Nobody overtakes; and they are no more than one prefill microbatch of each worker takes.
        """
        config = self._config
        room = Room(config, self.pages.free_by_worker, [config.seats - count for count in self._running])
        most = config.segments * max(rows for rows, _ in config.prefill_buckets)
        most = min(most, config.max_num_seqs - self.num_running)
        admissible: list[LiveRequest] = []
        for request in waiting:
            if len(admissible) == most or (worker := room.place(request.num_pages)) is None:
                break
            request.worker = worker
            admissible.append(request)
        return admissible

    def admit(self, request: LiveRequest) -> None:
        """Give a request its pages and a seat on the worker that was chosen for it."""
        self._running[self._config.segment(request.worker)] += 1
        request.pages = self.pages.allocate(owners(request.worker, request.num_pages, self._config).tolist())

    def release(self, request: LiveRequest) -> None:
        """Its seat is free now, its pages when the last step that names it is complete."""
        self._running[self._config.segment(request.worker)] -= 1
        self.pages.free(request.pages, after_step=request.last_step)


class Room:
    """The pages and seats that are left while requests are placed, one after the other.

    Args:
        config: says how pages are dealt.
        pages: free pages of each worker.
        seats: requests that each segment of rows can still take.
    """

    def __init__(self, config: SchedulerConfig, pages: Sequence[int], seats: Sequence[int]) -> None:
        self._config, self._pages, self._seats = config, np.array(pages), list(seats)

    def place(self, num_pages: int) -> int | None:
        """Take pages and a seat for a request; the worker that it begins on, or None if it must wait.

        That is the worker with most free pages among those that have a seat and from which the pages can
        be dealt.
        """
        if self._pages.sum() < num_pages:
            return None
        for worker in np.argsort(-self._pages, kind="stable").tolist():
            needed = np.bincount(owners(worker, num_pages, self._config), minlength=self._config.workers)
            segment = self._config.segment(worker)
            if self._seats[segment] and (needed <= self._pages).all():
                self._pages -= needed
                self._seats[segment] -= 1
                return worker
        return None


def owners(worker: int, num_pages: int, config: SchedulerConfig) -> np.ndarray:
    """int[num_pages]: the worker of each page of a request that begins on `worker`.

    By token the next page is the next worker's; else one worker has all of them.
    """
    stride = int(config.partition == "tokens")
    return (worker + stride * np.arange(num_pages)) % config.workers
