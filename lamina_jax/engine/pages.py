"""The page pool: which pages of the KV cache are free, and when a page may change hands.

It owns page numbers and their leases. It knows nothing of requests, tokens, devices or jax.
"""

from __future__ import annotations

from collections.abc import Iterable


class PageError(RuntimeError):
    """Pages were asked for that are not free, or given back by someone who does not hold them."""


class PagePool:
    """`num_pages` pages of `page_size` tokens each. Free and used pages always add up to `num_pages`.

    A step in flight may still read and write the pages that it names. So pages are given back with
    the number of the last step that names them, and stay used until that step is complete.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must both be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._held = bytearray(num_pages)
        self._leaving: dict[int, list[int]] = {}
        self._completed = -1

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that are held, or given back while a step that names them is in flight."""
        return self.num_pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages. PageError if there are fewer."""
        if not 0 <= count <= len(self._free):
            raise PageError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        split = len(self._free) - count
        pages = self._free[split:]
        del self._free[split:]
        for page in pages:
            self._held[page] = True
        return pages

    def free(self, pages: Iterable[int], *, after_step: int = -1) -> None:
        """Give held pages back; they are free again once step `after_step` is complete."""
        pages = list(pages)
        for page in pages:
            if not (0 <= page < self.num_pages and self._held[page]):
                raise PageError(f"page {page} is given back but not held (num_pages={self.num_pages})")
            self._held[page] = False
        if after_step <= self._completed:
            self._free += pages
        else:
            self._leaving.setdefault(after_step, []).extend(pages)

    def complete(self, step: int) -> None:
        """Every step up to `step` is complete: free the pages that waited for one of them."""
        self._completed = max(self._completed, step)
        for waited in [s for s in self._leaving if s <= step]:
            self._free += self._leaving.pop(waited)
