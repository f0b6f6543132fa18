"""Where a growing text ends at a stop string, and how much of it may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in what was not shown yet of a text, across the borders of its tokens.

    What was shown need not be looked at again: no stop string begins in it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._firsts = {stop[0] for stop in stops}
        self._longest = max(map(len, stops), default=1) - 1  # of their beginnings

    def find(self, text: str) -> tuple[int, str] | None:
        """(where it begins, the stop string) of the first one in `text`; None where there is none."""
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(found, key=lambda hit: hit[0], default=None)

    def shown(self, text: str) -> int:
        """How many characters of `text` may be shown: the end of it may yet become a stop string."""
        for start in range(max(0, len(text) - self._longest), len(text)):
            if text[start] in self._firsts and self._begins(text[start:]):
                return start
        return len(text)

    def _begins(self, text: str) -> bool:
        """Whether some stop string begins so, and goes on."""
        return any(len(text) < len(stop) and stop.startswith(text) for stop in self._stops)
