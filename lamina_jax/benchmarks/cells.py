"""The cells of `bench decode`, a batch and a context each, and which of them fit into memory.

Estimates only: nothing is started here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lamina_jax.models.hf_config import read_config

PAGE_SIZE = 64
PROCESS_BYTES = 2**30
"""Of a column beside its weights and its cache: code, compiled programs, activations, logits."""

ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Cell(NamedTuple):
    """Requests decoded at once, and cached tokens of each."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"

    @property
    def pages(self) -> int:
        """KV pages, with room for the new token of each request."""
        return self.batch * -(-(self.context + 1) // PAGE_SIZE)


Footprint = Callable[[Cell], int]
"""Bytes of one column at a cell."""


def footprint(folder: Path, dtype: str) -> Footprint:
    """Of the checkpoint in `folder`, whose weights and cache are `dtype`."""
    config, size = read_config(folder), ITEMSIZE[dtype]
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    fixed = PROCESS_BYTES + weights * size // ITEMSIZE[config.dtype]
    page = 2 * config.num_layers * config.num_kv_heads * config.head_dim * PAGE_SIZE * size
    return lambda cell: fixed + cell.pages * page


class Fit(NamedTuple):
    """Cells by what memory allows: all columns at once, one column at a time, or none."""

    together: list[Cell]
    alone: list[Cell]
    refused: list[Cell]


def fit(cells: Sequence[Cell], one: Footprint, columns: int, budget: int) -> Fit:
    """Sort the cells; `columns` of footprint `one` are to be compared in `budget` bytes."""
    together, alone, refused = found = Fit([], [], [])
    for cell in cells:
        need = one(cell)
        kind = together if columns * need <= budget else alone if need <= budget else refused
        kind.append(cell)
    return found
