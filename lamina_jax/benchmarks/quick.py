"""`--quick` of a benchmark: other defaults of its flags. A flag that is given holds all the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_quick(parser: argparse.ArgumentParser, told: str, **defaults: Any) -> None:
    """Add the flag, which gives arguments these `defaults`; `told` is what they come to."""
    parser.add_argument(
        "--quick", action="store_const", const=defaults, help=f"{told}, where other flags say nothing else"
    )


def parse(parser: argparse.ArgumentParser, flags: Sequence[str]) -> argparse.Namespace:
    """The arguments; for a parser with or without the flag."""
    args = parser.parse_args(flags)
    if quick := getattr(args, "quick", None):
        parser.set_defaults(**quick)
        args = parser.parse_args(flags)
    return args
