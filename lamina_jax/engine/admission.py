"""Admission: which waiting requests have room, which workers hold them, and who leaves when pages run out.

It owns seats, pages and the choice of workers. It knows nothing of steps, rows, devices or jax.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
        self._running: list[dict[int, LiveRequest]] = [{} for _ in range(config.segments)]  # by arrival

    @property
    def num_running(self) -> int:
        """Requests that were admitted and not released."""
        return sum(map(len, self._running))

    def admissible(self, waiting: Collection[LiveRequest]) -> list[LiveRequest]:
        """Those from the head of the queue on that have room together, each with its `worker` set.

        Nobody overtakes; and they are no more than one prefill microbatch of each worker takes. A request
        that was preempted waits for the last step that names it, too: its tokens are not known before.
        """
        config = self._config
        most = config.segments * max(rows for rows, _ in config.prefill_buckets)
        most = min(most, config.max_num_seqs - self.num_running)
        if not waiting or not most:
            return []
        room = Room(
            config,
            self.pages.free_by_worker,
            seats=[config.seats - len(running) for running in self._running],
            growing=[sum(map(self._grows, running.values())) for running in self._running],
        )
        admissible: list[LiveRequest] = []
        for request in waiting:
            if len(admissible) == most or request.last_step > self.pages.completed:
                break
            pages, most_pages = self._first_pages(request), self.pages.pages_for(request.most_cached)
            if (worker := room.place(pages, grows=pages < most_pages)) is None:
                break
            request.worker = worker
            admissible.append(request)
        return admissible

    def admit(self, request: LiveRequest) -> None:
        """Give a request a seat on the worker that was chosen for it, and its first pages."""
        self._running[self._config.segment(request.worker)][request.arrival] = request
        dealt = owners(request.worker, self._first_pages(request), self._config)
        request.pages = self.pages.allocate(dealt.tolist())
        request.running, request.prefilled = True, 0

    def release(self, request: LiveRequest) -> None:
        """Its seat is free now, its pages when the last step that names it is complete, or the errand over
        that brings its KV."""
        del self._running[self._config.segment(request.worker)][request.arrival]
        self.pages.free(request.pages, after_step=request.last_step, after_errand=request.errand)
        request.running, request.pages = False, []

    def to_preempt(self, growing: Sequence[LiveRequest]) -> LiveRequest | None:
        """Who has to leave before each of `growing` can have one more page; None: nobody.

        That is the youngest of those whose pages would help. Pages that are about to be free count, so
        that nobody leaves for want of patience; and the oldest of all never leaves.
        """
        needed = np.bincount(self._next_owners(growing), minlength=self._config.workers)
        coming = np.add(self.pages.free_by_worker, self.pages.leaving_by_worker)
        short = np.flatnonzero(needed > coming)
        if not len(short):
            return None
        running = self._running[self._config.segment(int(short[0]))]
        return running[max(running)]

    def grow(self, growing: Sequence[LiveRequest]) -> bool:
        """Give each of `growing` its next page; or none of them any, until those are free."""
        dealt = self._next_owners(growing)
        if (np.bincount(dealt, minlength=self._config.workers) > self.pages.free_by_worker).any():
            return False
        for request, page in zip(growing, self.pages.allocate(dealt), strict=True):
            request.pages.append(page)
        return True

    def _first_pages(self, request: LiveRequest) -> int:
        """Pages for its tokens and the next one, where that is cached at all."""
        return self.pages.pages_for(min(len(request.tokens) + 1, request.most_cached))

    def _grows(self, request: LiveRequest) -> bool:
        """Whether a running request may need more pages than it has."""
        return len(request.pages) < self.pages.pages_for(request.most_cached)

    def _next_owners(self, growing: Sequence[LiveRequest]) -> list[int]:
        """The worker of the next page of each request."""
        stride = page_stride(self._config)
        return [(r.worker + stride * len(r.pages)) % self._config.workers for r in growing]


class Room:
    """The pages and seats that are left while requests are placed, one after the other.

    A page stays free for every request that may still need one: without it, who is admitted would be
    preempted a few steps later.

    Args:
        config: says how pages are dealt.
        pages: free pages of each worker.
        seats: requests that each segment of rows can still take.
        growing: requests of each segment that may still need pages.
    """

    def __init__(
        self, config: SchedulerConfig, pages: Sequence[int], seats: Sequence[int], growing: Sequence[int]
    ) -> None:
        self._config, self._pages = config, np.array(pages)
        self._seats, self._growing = list(seats), list(growing)

    def place(self, num_pages: int, *, grows: bool) -> int | None:
        """Take pages and a seat for a request; the worker that it begins on, or None if it must wait.

        That is the worker with most free pages among those that have a seat and from which the pages can
        be dealt.
        """
        if self._pages.sum() < num_pages:
            return None
        for worker in np.argsort(-self._pages, kind="stable").tolist():
            needed = np.bincount(owners(worker, num_pages, self._config), minlength=self._config.workers)
            segment = self._config.segment(worker)
            free = self._pages[worker] if self._config.segments > 1 else self._pages.sum()
            enough = (needed <= self._pages).all() and num_pages + self._growing[segment] <= free
            if self._seats[segment] and enough:
                self._pages -= needed
                self._seats[segment] -= 1
                self._growing[segment] += grows
                return worker
        return None


def owners(worker: int, num_pages: int, config: SchedulerConfig) -> np.ndarray:
    """int[num_pages]: the worker of each page of a request that begins on `worker`.

    By token the next page is the next worker's; else one worker has all of them.
    """
    return (worker + page_stride(config) * np.arange(num_pages)) % config.workers


def page_stride(config: SchedulerConfig) -> int:
    """How many workers further the next page of a request is."""
    return int(config.partition == "tokens")
