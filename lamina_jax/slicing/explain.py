"""The table of a sliced function, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
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
    on_wire = size_of(array for op in attentions for array in (op.q, op.k, op.v, op.o))
    lines.append(f"in all: carried {size_of(chain(*carried))}, wire {on_wire}")
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
        return [(name, "1", operators_of(slices[i].fused), _inputs(slices[i].fused), "", "")]
    first, second = slices[i].stages
    op = attentions[i]
    on = " ".join([*map(type_of, carried[i]), size_of(carried[i])]) if carried[i] else "nothing"
    wire = f"k {size_of([op.k])}, v {size_of([op.v])}, o {size_of([op.o])} back"
    return [
        (name, "1", operators_of(first), _inputs(first), "", f"q {size_of([op.q])}"),
        ("", "2", operators_of(second), _inputs(second), on, wire),
    ]


def operators_of(stage: Stage) -> str:
    """How many it runs, and which of them cost: `14 (1 dot_general, 1 gather)`."""
    costly = Counter(name for name in stage.operators if name not in CHEAP)
    named = ", ".join(f"{count} {name}" for name, count in sorted(costly.items()))
    return f"{len(stage.operators)} ({named})" if named else str(len(stage.operators))


def _inputs(stage: Stage) -> str:
    counts = Counter(port.kind for port in stage.inputs)
    return ", ".join(text.format(counts[kind]) for kind, text in _INPUTS.items() if kind in counts)


def type_of(array: jax.ShapeDtypeStruct) -> str:
    """`bf16[8,512]`"""
    return jax.core.ShapedArray(array.shape, array.dtype).str_short(short_dtypes=True)


def size_of(arrays: Iterable[jax.ShapeDtypeStruct]) -> str:
    """`8,192 B`"""
    return f"{sum(prod(array.shape) * array.dtype.itemsize for array in arrays):,} B"
