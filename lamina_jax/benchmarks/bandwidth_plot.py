"""Draws decode speed against bandwidth. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter


def draw(results: list[dict[str, Any]], demand: float, args: argparse.Namespace) -> None:
    """Write `args.plot`: a line for each result of `lamina_jax.benchmarks.bandwidth`, and the formula's
    bandwidth, `demand`."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lamina"})
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for result in results:
        free, *points = result["points"]
        (line,) = axes.plot(
            [point["bytes_per_second"] / 1e6 for point in points],
            [point["tokens_per_second"] for point in points],
            marker="o",
            label=result["way"],
        )
        axes.axhline(free["tokens_per_second"], color=line.get_color(), linestyle=":", linewidth=1)
        if result["measured"]:
            axes.axvline(result["measured"] / 1e6, color=line.get_color(), linestyle="--", linewidth=1)
    axes.axvline(demand / 1e6, color="black", linewidth=1, label="the formula's bandwidth")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MB/s each way (dashed: a step takes 1.2 times as long)")
    axes.set_ylabel("tokens/s (dotted: unthrottled)")
    axes.set_title(f"batch {args.batch}, context {args.context}")
    axes.legend()
    figure.savefig(args.plot, metadata={"Date": None} if args.plot.suffix == ".svg" else None)
