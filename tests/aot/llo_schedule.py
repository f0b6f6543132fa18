"""The schedule that a TPU's compiler ends with, as `--xla_jf_dump_llo_text` writes it: its loops, in bundles.

A bundle is what one cycle issues where nothing stalls. Knows nothing of what the program computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# `0x6c LB: >> { ...`: an address, what begins there, the depth of the loops around it, the operations.
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: ?(>*)(?: >)* ?\{(.*)")


@dataclass
class Loop:
    """Attributes: how deep it is nested, its first and last address, whether it multiplies matrices."""

    depth: int
    first: int
    last: int
    multiplies: bool = False

    @property
    def bundles(self) -> int:
        """Those of the loops in it and of branches seldom taken count, too."""
        return self.last - self.first + 1


def loops(schedule: str) -> list[Loop]:
    """All loops of a schedule, in the order of their beginnings."""
    found: list[Loop] = []
    around: list[Loop] = []
    for line in schedule.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        address, depth = int(bundle[1], 16), len(bundle[3])
        if bundle[2] == "LB":
            around = [loop for loop in around if loop.depth < depth]
            around.append(Loop(depth, address, address))
            found.append(around[-1])
        # A bundle that was moved into a loop keeps the mark of where it came from.
        for loop in around:
            if depth >= loop.depth:
                loop.last = address
        inside = [loop for loop in around if depth >= loop.depth]
        if inside and "vmatmul" in bundle[4]:
            inside[-1].multiplies = True
    return found


def product_loop(folder: Path, kernel: str) -> Loop:
    """The innermost loop that multiplies matrices, of the one kernel with this name."""
    (file,) = (
        path for path in folder.glob(f"*{kernel}*-final_bundles.txt") if "schedule-analysis" not in path.name
    )
    multiplying = [loop for loop in loops(file.read_text()) if loop.multiplies]
    return max(multiplying, key=lambda loop: loop.depth)
