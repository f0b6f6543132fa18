"""Benchmark results as text, and the modules that not every installation can import."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]) if first else "  ".join(others)

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def format_rows(columns: Sequence[tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    """A row of text for each of `rows`.

    Args:
        columns: the header of each, and a format of a row's values, such as "{share:.2f}". A cell is empty
            where the row lacks one of them, and "-" where that is None.
    """

    def cell(form: str, row: Mapping[str, Any]) -> str:
        try:
            return form.format_map(row)
        except KeyError:
            return ""
        except TypeError:  # None takes no format
            return "-"

    header = [name for name, _ in columns]
    return format_table(header, [[cell(form, row) for _, form in columns] for row in rows])


def optional(module: str, what: str, extra: str) -> Any:
    """A module of this package; SystemExit where what it imports, an `extra` of ours, is not installed."""
    try:
        return importlib.import_module(f"lamina_jax.benchmarks.{module}")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{what} needs {error.name}: install lamina_jax[{extra}]") from None
