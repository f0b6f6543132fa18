"""Where a growing text ends at a stop string, and how much of it may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in one text, across the borders of its tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)

    def find(self, text: str, seen: int) -> tuple[int, str] | None:
        """(where it begins, the stop string) of the first one in `text`, of which `seen` characters were
        searched before; None where there is none."""
        start = max(0, seen - self._longest + 1)
        found = [(place, stop) for stop in self._stops if (place := text.find(stop, start)) >= 0]
        return min(found, key=lambda hit: hit[0], default=None)

    def shown(self, text: str) -> str:
        """`text` without an end that may yet become a stop string."""
        for count in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return text[:-count]
        return text
