"""Benchmark results as text, and the way to their plots."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]) if first else "  ".join(others)

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def plotter(module: str) -> Callable[..., None]:
    """`draw` of a module of this package that needs matplotlib. Raises SystemExit where there is none."""
    try:
        return importlib.import_module(f"lamina_jax.benchmarks.{module}").draw
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"--plot needs {error.name}: install lamina_jax[plots], or leave --plot out"
        ) from None
