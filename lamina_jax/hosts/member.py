"""What a compute host's own engine needs of the others, whichever host it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Member(Protocol):
    """Host `host_id` of `num_hosts`; `group` leases the workers together."""

    @property
    def host_id(self) -> int: ...
    @property
    def num_hosts(self) -> int: ...
    @property
    def group(self) -> str: ...

    def agree(self, num_pages: int) -> int:
        """The pages of each part of the cache that all hosts take: those of host 0."""
        ...

    def compiled(self, report: Callable[[str, int, int], None]) -> None:
        """This host can run steps; host 0 returns when all can."""
        ...

    def fail(self, reason: str) -> None:
        """Tell the others that this host gives up; it ends after that."""
        ...

    def lost(self, reason: str) -> None:
        """Something that all hosts need is gone: end all of them, from any thread."""
        ...
