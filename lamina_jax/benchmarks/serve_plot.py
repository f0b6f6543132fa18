"""Draws what a load client saw. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lamina_jax.benchmarks.latencies import Record

BINS = 50
"""Of time."""

PERCENTILES = {50: "tab:green", 90: "tab:orange", 99: "tab:red"}
LEAST_MS = 0.1
"""Events that a client reads together lie closer, and are not to stretch the axis."""


def draw(records: Sequence[Record], seconds: float, file: Path) -> None:
    """Write `file`: how time to first token and inter-token gaps are distributed, and tokens over time."""
    ok = [record for record in records if record.error is None and record.arrivals]
    if not ok:
        raise SystemExit("--plot: no request has ended as it should, so there is nothing to draw")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lamina"})
    figure = Figure(figsize=(10, 6), layout="constrained")
    spaces = figure.subplot_mosaic([["ttft", "itl"], ["time", "time"]])
    ttft = 1e3 * np.array([record.arrivals[0] for record in ok])
    _distribution(spaces["ttft"], ttft, "time to first token", "requests")
    gaps = 1e3 * np.array([gap for record in ok for gap in record.gaps])
    _distribution(spaces["itl"], gaps, "inter-token gap", "gaps")
    _over_time(spaces["time"], ok, seconds)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _distribution(axes: Axes, milliseconds: np.ndarray, what: str, of: str) -> None:
    """The share that is at most so long, with three percentiles; times on a logarithmic scale."""
    axes.set(xlabel=f"{what}, ms", ylabel=f"share of {of}", ylim=(0, 1), xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if not len(milliseconds):
        return
    axes.ecdf(milliseconds, color="tab:blue", linewidth=2)
    axes.set_xlim(left=max(np.percentile(milliseconds, 2) / 2, LEAST_MS))
    for percent, colour in PERCENTILES.items():
        value = np.percentile(milliseconds, percent)
        axes.plot(
            value, percent / 100, "o", color=colour, clip_on=False, label=f"p{percent}: {value:,.1f} ms"
        )
    axes.legend(loc="best")


def _over_time(axes: Axes, records: Sequence[Record], seconds: float) -> None:
    """Output tokens/s, and how many requests have been sent and have not ended."""
    edges = np.linspace(0, seconds, BINS + 1)
    times = [record.sent + arrival for record in records for arrival in record.arrivals]
    tokens = [count for record in records for count in record.counts]
    rate = np.histogram(times, edges, weights=tokens)[0] / np.diff(edges)
    axes.stairs(rate, edges, fill=True, color="tab:blue", alpha=0.7, label="output tokens/s")
    axes.set(xlabel="seconds", ylabel="output tokens/s", xlim=(0, seconds))
    running = axes.twinx()
    changes = sorted(
        [(record.sent, 1) for record in records]
        + [(record.sent + record.arrivals[-1], -1) for record in records]
    )
    at, change = np.array(changes).T
    running.step(at, np.cumsum(change), where="post", color="tab:orange", label="requests in the system")
    running.set(ylabel="requests in the system", ylim=(0, None))
    axes.set_ylim(bottom=0)
    handles = [axes.get_legend_handles_labels(), running.get_legend_handles_labels()]
    labels = (a + b for a, b in zip(*handles, strict=True))
    running.legend(*labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
