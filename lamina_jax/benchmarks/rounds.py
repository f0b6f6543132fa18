"""What is compared is timed in turn, round after round, so that a busy neighbour meets all of it alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Taken = TypeVar("Taken")


def in_turn(timed: Mapping[Name, Callable[[], Taken]], rounds: int) -> dict[Name, list[Taken]]:
    """What each call returned, round by round."""
    taken = [{name: once() for name, once in timed.items()} for _ in range(rounds)]
    return {name: [one[name] for one in taken] for name in timed}


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> float:
    """From the least to the largest, as a share of the median."""
    return (max(values) - min(values)) / statistics.median(values)
