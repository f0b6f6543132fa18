"""The benchmarks: `python -m lamina_jax.bench NAME`; each prints a table, and JSON where asked."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import jax

from lamina_jax.benchmarks import (
    bandwidth,
    decode,
    engine,
    exchange,
    overlap,
    partition,
    perplexity,
    prefill,
    sampler,
    serve,
    startup,
)

BENCHMARKS = {
    "bandwidth": bandwidth,
    "decode": decode,
    "engine": engine,
    "exchange": exchange,
    "overlap": overlap,
    "partition": partition,
    "perplexity": perplexity,
    "prefill": prefill,
    "sampler": sampler,
    "serve": serve,
    "startup": startup,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lamina_jax.bench", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        sub = names.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args()
    results = BENCHMARKS[args.name].run(args)
    if args.json:
        facts = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(
            json.dumps({"benchmark": args.name, **facts, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
