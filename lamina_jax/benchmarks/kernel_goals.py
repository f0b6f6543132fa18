"""The goals of `bench kernels`, met or missed, from its rows. Knows nothing of how they were timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHARE, OF_BFLOAT16 = "share", "of_bfloat16"
"""Of what the device's memory gives; and the rate of tokens beside that of the same kernel in bfloat16."""

GOALS = {
    ("cpu", "float32"): (SHARE, 0.45, 0),
    ("cpu", "bfloat16"): (SHARE, 0.45, 0),
    ("cpu", "int8"): (OF_BFLOAT16, 1.5, 0),
    ("native", "float32"): (SHARE, 0.6, 0),
    ("native", "bfloat16"): (SHARE, 0.6, 0),
    ("native", "int8"): (OF_BFLOAT16, 1.5, 0),
    ("gpu-planned", "bfloat16"): (SHARE, 0.9, 10**9),
    ("gpu-planned", "int8"): (OF_BFLOAT16, 1.8, 10**9),
}
"""By kernel and dtype: the least that a figure should be, in cells of at least so many bytes in bfloat16."""

FIXED_MICROSECONDS = {"gpu-planned": 15.0}
"""By kernel: the most that a call may cost beside what it reads, on an H100."""

WORDS = {SHARE: "of what the device gives", OF_BFLOAT16: "of bfloat16's rate of tokens"}


def goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each goal that the rows say something of."""
    for (kernel, dtype), (figure, least, cell_bytes) in GOALS.items():
        mine = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype) and figure in row]
        found = [row[figure] for row in mine if row["cell_bytes"] >= cell_bytes]
        if found:
            yield (
                f"goal: {kernel} {dtype} at least {least} {WORDS[figure]}: {min(found):.2f} to "
                f"{max(found):.2f}, met in {sum(value >= least for value in found)} of {len(found)} cells"
            )
    for row in rows:
        if "fixed_microseconds" in row and row["kernel"] in FIXED_MICROSECONDS:
            most, cost = FIXED_MICROSECONDS[row["kernel"]], row["fixed_microseconds"]
            yield (
                f"goal: {row['kernel']} {row['dtype']} fixed cost of a call at most {most:g} us: "
                f"{cost:.1f} ({'met' if cost <= most else 'missed'})"
            )
