"""The benchmarks: `python -m lamina_jax.bench NAME`; each prints a table, and JSON where asked.

A benchmark is imported when it is named, and needs no more than it uses itself: `kernels` runs where the
server's packages are not installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path

import jax

from lamina_jax.benchmarks.quick import parse

BENCHMARKS = (
    "aot",
    "bandwidth",
    "decode",
    "engine",
    "exchange",
    "hosts",
    "interference",
    "kernels",
    "overlap",
    "partition",
    "perplexity",
    "prefill",
    "sampler",
    "serve",
    "startup",
)
COMMAND = "python -m lamina_jax.bench"


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def main() -> None:
    names = argparse.ArgumentParser(
        prog=COMMAND,
        description=(__doc__ or "").split("\n", 1)[0],
        epilog=f"'{COMMAND} NAME --help' tells what a benchmark measures, and its flags",
    )
    names.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    name = names.parse_args(sys.argv[1:2]).name
    benchmark = importlib.import_module(f"lamina_jax.benchmarks.{name}")
    told = (benchmark.__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog=f"{COMMAND} {name}", description=told, formatter_class=Defaults)
    benchmark.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parse(parser, sys.argv[2:])
    results = benchmark.run(args)
    if args.json:
        facts = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"benchmark": name, **facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
