"""The table of a sliced function, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod

import jax

from lamina_jax.slicing.graph import CHEAP
from lamina_jax.slicing.stages import Attention, Slice, Stage

_HEADER: tuple[str, ...] = ("slice", "stage", "operators", "inputs", "carried on", "wire")
_INPUTS = {
    "argument": "{} args",
    "carried": "{} carried",
    "attention": "o",
    "stage1": "{} of stage 1",
}


def table(
    slices: Sequence[Slice],
    attentions: Sequence[Attention],
    carried: Sequence[Sequence[jax.ShapeDtypeStruct]],
) -> str:
    """One row per stage, like slices under each other as one; bytes are those of one call."""
    rows = [_HEADER]
    numbered = enumerate(slices)
    for _, group in groupby(numbered, key=lambda pair: [stage.key for stage in pair[1].stages]):
        like = [i for i, _ in group]
        rows += _slice_rows(like, slices, attentions, carried)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    on_wire = sum(_bytes([op.q, op.k, op.v, op.o]) for op in attentions)
    lines.append(f"in all: carried {sum(map(_bytes, carried)):,} B, wire {on_wire:,} B")
    return "\n".join(lines)


def _slice_rows(
    like: Sequence[int],
    slices: Sequence[Slice],
    attentions: Sequence[Attention],
    carried: Sequence[Sequence[jax.ShapeDtypeStruct]],
) -> list[tuple[str, ...]]:
    i = like[0]
    name = str(i) if len(like) == 1 else f"{i}-{like[-1]}"
    if i == len(attentions):
        return [(name, "1", _operators(slices[i].fused), _inputs(slices[i].fused), "", "")]
    first, second = slices[i].stages
    op = attentions[i]
    arrays = [jax.core.ShapedArray(a.shape, a.dtype).str_short(short_dtypes=True) for a in carried[i]]
    on = f"{' '.join(arrays)} {_bytes(carried[i]):,} B" if arrays else "nothing"
    wire = f"k {_bytes([op.k]):,} B, v {_bytes([op.v]):,} B, o {_bytes([op.o]):,} B back"
    return [
        (name, "1", _operators(first), _inputs(first), "", f"q {_bytes([op.q]):,} B"),
        ("", "2", _operators(second), _inputs(second), on, wire),
    ]


def _operators(stage: Stage) -> str:
    costly = Counter(name for name in stage.operators if name not in CHEAP)
    named = ", ".join(f"{count} {name}" for name, count in sorted(costly.items()))
    return f"{len(stage.operators)} ({named})" if named else str(len(stage.operators))


def _inputs(stage: Stage) -> str:
    counts = Counter(port.kind for port in stage.inputs)
    return ", ".join(text.format(counts[kind]) for kind, text in _INPUTS.items() if kind in counts)


def _bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(prod(array.shape) * array.dtype.itemsize for array in arrays)
