"""Where a growing text ends at a stop string, and how much of it may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in what was not shown yet of a text, across the borders of its tokens.

    What was shown need not be looked at again: no stop string begins in it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = {stop[:count] for stop in stops for count in range(1, len(stop))}
        self._longest = max(map(len, self._beginnings), default=0)

    def find(self, text: str) -> tuple[int, str] | None:
        """(where it begins, the stop string) of the first one in `text`; None where there is none."""
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(found, key=lambda hit: hit[0], default=None)

    def shown(self, text: str) -> int:
        """How many characters of `text` may be shown: the end of it may yet become a stop string."""
        for count in range(min(len(text), self._longest), 0, -1):
            if text[-count:] in self._beginnings:
                return len(text) - count
        return len(text)
