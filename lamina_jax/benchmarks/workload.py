"""What a load test sends, and when: lengths and arrivals, made up from a seed or read from a trace.

Knows nothing of HTTP or of engines.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
"""Of a trace."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request to be sent.

    Attributes:
        at: seconds after the first one that it arrives.
        prompt: token ids.
        max_tokens: most tokens of its continuation.
    """

    at: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Arrivals and lengths of R requests, in the order of their arrival.

    Attributes:
        at: float64[R], seconds.
        prompt, output: int64[R], tokens, at least 1.
    """

    at: np.ndarray
    prompt: np.ndarray
    output: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def scaled(self, factor: float) -> Shapes:
        """The same arrivals with lengths multiplied and rounded, at least 1."""
        prompt, output = (
            np.maximum(1, np.rint(factor * lengths)).astype(np.int64)
            for lengths in (self.prompt, self.output)
        )
        return Shapes(at=self.at, prompt=prompt, output=output)

    def that_fit(self, context: int) -> Shapes:
        """Those whose prompt and continuation have `context` tokens at most."""
        fits = self.prompt + self.output <= context
        return Shapes(at=self.at[fits], prompt=self.prompt[fits], output=self.output[fits])


Bounds = tuple[int, int]


def length_bounds(text: str) -> Bounds:
    """The bounds of a length, both included: "128", or "16:512". For argparse."""
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"expected N or LEAST:MOST, from 1 up, got {text!r}")
    return bounds


def made_up(count: int, prompt: Bounds, output: Bounds, random: np.random.Generator) -> Shapes:
    """Lengths drawn evenly from their bounds; all arrive at once."""
    return Shapes(
        at=np.zeros(count),
        prompt=random.integers(*prompt, size=count, endpoint=True),
        output=random.integers(*output, size=count, endpoint=True),
    )


def poisson(count: int, rate: float, random: np.random.Generator) -> np.ndarray:
    """float64[count]: arrivals with exponential gaps of 1 / `rate` seconds in the mean, the first at 0."""
    if math.isinf(rate):
        return np.zeros(count)
    gaps = random.exponential(1 / rate, size=count)
    return np.cumsum(gaps) - gaps[0]


def with_prompts(shapes: Shapes, ids_below: int, random: np.random.Generator) -> list[Planned]:
    """Requests of those shapes; each token of a prompt is drawn evenly from 0 .. `ids_below` - 1."""
    return [
        Planned(at=float(at), prompt=random.integers(ids_below, size=prompt).tolist(), max_tokens=int(output))
        for at, prompt, output in zip(shapes.at, shapes.prompt, shapes.output, strict=True)
    ]


def read_trace(path: Path, count: int) -> Shapes:
    """The first `count` requests of a trace with the columns `COLUMNS`: .csv or .jsonl, also .gz of either.

    Raises:
        ValueError: a line that is not a request; the message names it.
    """
    is_json, lines = ".jsonl" in path.suffixes, _lines(path)
    found: Iterable[Any] = map(json.loads, lines) if is_json else csv.DictReader(lines)
    rows = [
        _row(row, f"{path}, line {number}")
        for number, row in enumerate(itertools.islice(found, count), start=1 if is_json else 2)
    ]
    if not rows:
        raise ValueError(f"{path} has no requests")
    at, prompt, output = np.array(sorted(rows)).T
    return Shapes(at=at - at[0], prompt=prompt.astype(np.int64), output=output.astype(np.int64))


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()


def _row(row: Mapping[str, Any], where: str) -> tuple[float, int, int]:
    try:
        at, prompt, output = (row[name] for name in COLUMNS)
        found = float(at), int(prompt), int(output)
    except (KeyError, TypeError, ValueError):
        found = 0.0, 0, 0
    if not (math.isfinite(found[0]) and found[1] >= 1 and found[2] >= 1):
        raise ValueError(f"{where}: expected {', '.join(COLUMNS)}, lengths from 1 up; got {dict(row)}")
    return found
