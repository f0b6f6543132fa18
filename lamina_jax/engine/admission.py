"""Admission: which worker takes a request, and which of them each of its pages is dealt to.

It owns the choice of workers. It knows nothing of the queue, of steps, devices or jax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamina_jax.engine.scheduler_config import SchedulerConfig


def owners(worker: int, num_pages: int, config: SchedulerConfig) -> np.ndarray:
    """int[num_pages]: the worker of each page of a request that begins on `worker`.

    By token the next page is the next worker's; else one worker has all of them.
    """
    stride = int(config.partition == "tokens")
    return (worker + stride * np.arange(num_pages)) % config.workers


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
            segment = worker % self._config.segments
            if self._seats[segment] and (needed <= self._pages).all():
                self._pages -= needed
                self._seats[segment] -= 1
                return worker
        return None
