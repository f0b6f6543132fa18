"""The page pool: which pages of the KV cache are free, and when a page may change hands.

It owns page numbers and their leases. It knows nothing of requests, tokens, devices or jax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PageError(RuntimeError):
    """Pages were asked for that are not free, or given back by someone who does not hold them."""


class PagePool:
    """`num_pages` pages of `page_size` tokens each. Free and used pages always add up to `num_pages`.

    Each of `workers` has an equal share: pages 0 .. share - 1 are worker 0's, and so on.

    A step in flight may still read and write the pages that it names. So pages are given back with
    the number of the last step that names them, and stay used until that step is complete. Likewise an
    errand, which brings KV from elsewhere, may still write to pages until it is over.
    """

    def __init__(self, num_pages: int, page_size: int, workers: int = 1) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must both be at least 1")
        if workers < 1 or num_pages % workers:
            raise ValueError(f"num_pages={num_pages} are not equal shares of workers={workers}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._share = share = num_pages // workers
        self._free = [list(range((w + 1) * share - 1, w * share - 1, -1)) for w in range(workers)]
        self._held = bytearray(num_pages)
        self._leaving: dict[int, list[int]] = {}
        self._written: dict[int, list[int]] = {}
        self._completed = -1

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return sum(self.free_by_worker)

    @property
    def free_by_worker(self) -> list[int]:
        """How many of them each worker has."""
        return [len(free) for free in self._free]

    @property
    def leaving_by_worker(self) -> list[int]:
        """How many pages of each worker will be free once the steps in flight are complete, and the errands
        over that write to pages which were given back."""
        coming = [*self._leaving.values(), *self._written.values()]
        counts = Counter(page // self._share for pages in coming for page in pages)
        return [counts[worker] for worker in range(len(self._free))]

    @property
    def completed(self) -> int:
        """The last step that is complete; -1: none is."""
        return self._completed

    @property
    def num_used(self) -> int:
        """Pages that are held, or given back while a step that names them is in flight."""
        return self.num_pages - self.num_free

    def pages_for(self, tokens: int) -> int:
        """How many pages hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, owners: Sequence[int]) -> list[int]:
        """Take a free page of each worker named, in that order. PageError if one has too few."""
        for worker, count in Counter(owners).items():
            if count > len(self._free[worker]):
                raise PageError(
                    f"{count} pages asked for, {len(self._free[worker])} of {self._share} are free"
                    f" on worker {worker}"
                )
        pages = [self._free[worker].pop() for worker in owners]
        for page in pages:
            self._held[page] = True
        return pages

    def free(self, pages: Iterable[int], *, after_step: int = -1, after_errand: int | None = None) -> None:
        """Give held pages back; they are free again once step `after_step` is complete, or where one is
        named, errand `after_errand` is over."""
        pages = list(pages)
        for page in pages:
            if not (0 <= page < self.num_pages and self._held[page]):
                raise PageError(f"page {page} is given back but not held (num_pages={self.num_pages})")
            self._held[page] = False
        if after_errand is not None:
            self._written.setdefault(after_errand, []).extend(pages)
        elif after_step <= self._completed:
            self._release(pages)
        else:
            self._leaving.setdefault(after_step, []).extend(pages)

    def complete(self, step: int) -> None:
        """Every step up to `step` is complete: free the pages that waited for one of them."""
        self._completed = max(self._completed, step)
        for waited in [s for s in self._leaving if s <= step]:
            self._release(self._leaving.pop(waited))

    def errand_over(self, errand: int) -> None:
        """Nothing is written for an errand any more: free the pages that waited for it."""
        self._release(self._written.pop(errand, ()))

    @property
    def errands(self) -> list[int]:
        """Those that pages wait for."""
        return list(self._written)

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._free[page // self._share].append(page)
