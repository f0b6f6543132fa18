"""The goals of `bench kernels`, met or missed, from its rows. Knows nothing of how they were timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """The least that a figure of one kernel should be.

    Attributes:
        figure: "share", of what the device's memory gives, or "of_bfloat16", the rate of tokens beside that
            of the same kernel with a cache in bfloat16.
        cell_bytes: of KV in bfloat16; only cells with so many count.
    """

    kernel: str
    dtype: str
    figure: str
    least: float
    cell_bytes: int = 0


SHARE, OF_BFLOAT16 = "share", "of_bfloat16"
GOALS = (
    Goal("cpu", "float32", SHARE, 0.45),
    Goal("cpu", "bfloat16", SHARE, 0.45),
    Goal("cpu", "int8", OF_BFLOAT16, 1.5),
    Goal("native", "float32", SHARE, 0.6),
    Goal("native", "bfloat16", SHARE, 0.6),
    Goal("native", "int8", OF_BFLOAT16, 1.5),
    Goal("gpu-planned", "bfloat16", SHARE, 0.9, 10**9),
    Goal("gpu-planned", "int8", OF_BFLOAT16, 1.8, 10**9),
)
FIXED_MICROSECONDS = {"gpu-planned": 15.0}
"""By kernel: the most that a call may cost beside what it reads, on an H100."""

WORDS = {SHARE: "of what the device gives", OF_BFLOAT16: "of bfloat16's rate of tokens"}


def goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each goal that the rows say something of."""
    for goal in GOALS:
        found = [row[goal.figure] for row in rows if _counts(goal, row)]
        if found:
            met = sum(figure >= goal.least for figure in found)
            yield (
                f"goal: {goal.kernel} {goal.dtype} at least {goal.least} {WORDS[goal.figure]}: "
                f"{min(found):.2f} to {max(found):.2f}, met in {met} of {len(found)} cells"
            )
    for row in rows:
        if "fixed_microseconds" in row and row["kernel"] in FIXED_MICROSECONDS:
            most, cost = FIXED_MICROSECONDS[row["kernel"]], row["fixed_microseconds"]
            yield (
                f"goal: {row['kernel']} {row['dtype']} fixed cost of a call at most {most:g} us: "
                f"{cost:.1f} ({'met' if cost <= most else 'missed'})"
            )


def _counts(goal: Goal, row: Mapping[str, Any]) -> bool:
    return (
        (row["kernel"], row["dtype"]) == (goal.kernel, goal.dtype)
        and goal.figure in row
        and row["cell_bytes"] >= goal.cell_bytes
    )
