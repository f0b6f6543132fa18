"""The graph of a sliced function, for people: Mermaid text, which GitHub and many editors draw.

Owns the picture: slices as boxes of stages, attentions between them, an arrow for what passes from one to
the other. Knows nothing of how a cut is found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax

from lamina_jax.slicing.explain import operators_of, size_of, type_of
from lamina_jax.slicing.stages import Attention, Port, Slice, Stage

WITHIN, CARRIED, WIRE = "-->", "==>", "-.->"
"""Arrows: within a slice, carried on to the next one, to an attention and back."""

Passage = tuple[str, str, str, str, jax.ShapeDtypeStruct]
"""(from, arrow, to, name, what passes)"""


def mermaid(slices: Sequence[Slice], attentions: Sequence[Attention]) -> str:
    """A flowchart in which every array that leaves a slice stands once, with its type and bytes.

    Arguments, and so weights, are left out: they are free everywhere.
    """
    lines = ["flowchart TD"]
    for i, piece in enumerate(slices):
        nodes = [_box(i, j, stage) for j, stage in enumerate(piece.stages)]
        lines += [f'subgraph slice{i}["slice {i}"]', *nodes, "end"]
    lines += [f'attention{i}(["attention {i}"])' for i in range(len(attentions))]
    labels: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for tail, arrow, head, name, array in _passages(slices, attentions):
        labels[tail, arrow, head].append(f"{name} {type_of(array)} {size_of([array])}".lstrip())
    lines += [f'{tail} {arrow}|"{"<br>".join(text)}"| {head}' for (tail, arrow, head), text in labels.items()]
    return "\n    ".join(lines)


def _passages(slices: Sequence[Slice], attentions: Sequence[Attention]) -> Iterator[Passage]:
    for i, piece in enumerate(slices):
        for j, stage in enumerate(piece.stages):
            for port, array in zip(stage.inputs, stage.in_avals, strict=True):
                if port.kind == "stage1":
                    yield _node(i, 0), WITHIN, _node(i, j), "", array
            for port, array in zip(stage.outputs, stage.out_avals, strict=True):
                if port.kind == "carried":
                    yield _node(i, j), CARRIED, _reader(slices, i + 1, port), "", array
                elif port.kind not in ("stage1", "result"):
                    yield _node(i, j), WIRE, f"attention{i}", port.kind, array
        if i < len(attentions):
            yield f"attention{i}", WIRE, _reader(slices, i + 1, Port("attention")), "o", attentions[i].o


def _reader(slices: Sequence[Slice], i: int, port: Port) -> str:
    """The first stage of slice i that takes what comes in by `port`."""
    return _node(i, next(j for j, stage in enumerate(slices[i].stages) if port in stage.inputs))


def _box(i: int, j: int, stage: Stage) -> str:
    return f'{_node(i, j)}["stage {j + 1}<br>operators: {operators_of(stage)}"]'


def _node(i: int, j: int) -> str:
    return f"slice{i}stage{j + 1}"
