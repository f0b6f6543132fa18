"""Draws what a load client saw. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lamina_jax.benchmarks.latencies import Record

BINS = 40


def draw(records: Sequence[Record], seconds: float, file: Path) -> None:
    """Write `file`: how time to first token and inter-token gaps are distributed, and tokens over time."""
    ok = [record for record in records if record.error is None and record.arrivals]
    if not ok:
        raise SystemExit("--plot: no request has ended as it should, so there is nothing to draw")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lamina"})
    figure = Figure(figsize=(10, 6), layout="constrained")
    spaces = figure.subplot_mosaic([["ttft", "itl"], ["time", "time"]])
    _distribution(spaces["ttft"], 1e3 * np.array([record.arrivals[0] for record in ok]))
    spaces["ttft"].set(xlabel="time to first token, ms", ylabel="requests")
    _distribution(spaces["itl"], 1e3 * np.array([gap for record in ok for gap in record.gaps]))
    spaces["itl"].set(xlabel="inter-token gap, ms", ylabel="gaps")
    _over_time(spaces["time"], ok, seconds)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _distribution(axes: Axes, milliseconds: np.ndarray) -> None:
    """A histogram over a logarithmic scale, with its median and its 99th percentile."""
    if not len(milliseconds):
        return
    least = max(milliseconds.min(), 1e-2)
    most = max(milliseconds.max(), 1.05 * least)
    axes.hist(milliseconds, np.geomspace(least, most, BINS + 1), color="tab:blue", alpha=0.7)
    for percent, style in ((50, "-"), (99, "--")):
        value = np.percentile(milliseconds, percent)
        axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"p{percent}: {value:.3g} ms")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()


def _over_time(axes: Axes, records: Sequence[Record], seconds: float) -> None:
    """Output tokens/s, and how many requests have been sent and have not ended."""
    edges = np.linspace(0, seconds, 2 * BINS + 1)
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
    running.legend(*(a + b for a, b in zip(*handles, strict=True)), loc="upper right")
