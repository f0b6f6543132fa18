"""The kept steps as a trace for https://ui.perfetto.dev or chrome://tracing: JSON in the Trace Event Format.

Knows nothing of what the times mean beyond their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lamina_jax.exchange.timeline import Spans, Timeline
from lamina_jax.exchange.timings import Timings

Event = dict[str, Any]

ENGINE = 1
"""The engine's process id in the trace; the workers follow."""

STEPS, COMPUTE, SENDER, WAITS, WIRE = range(1, 6)
"""Threads of the engine. A thread's slices must not overlap, so what is on the wire has one for each
microbatch and worker, from `WIRE` on."""

ATTENTION = 1


def write_trace(file: str, timings: Timings) -> None:
    """Write what is kept to `file`. Raises `OSError`."""
    trace = {"displayTimeUnit": "ms", "traceEvents": list(events(Timeline(timings)))}
    Path(file).write_text(json.dumps(trace, separators=(",", ":")))


def events(timeline: Timeline) -> Iterator[Event]:
    """The kept steps: every process and thread by name, and a slice for everything that took time."""
    yield _name("process", ENGINE, 0, "engine")
    thread_names = {STEPS: "steps", COMPUTE: "compute", SENDER: "sender", WAITS: "decode loop waits"}
    for thread, name in thread_names.items():
        yield _name("thread", ENGINE, thread, name)
    yield from _steps(timeline)
    for i, kind in enumerate(("q", "k, v")):
        yield from _slices(timeline, ENGINE, COMPUTE, f"compute {kind}", _at(timeline.compute, i))
    for w, address in enumerate(timeline.addresses):
        worker = ENGINE + 1 + w
        yield _name("process", worker, 0, f"worker {address}")
        yield _name("thread", worker, ATTENTION, "attention")
        yield from _slices(timeline, worker, ATTENTION, "attention", _at(timeline.attention, w))
        yield from _slices(timeline, ENGINE, WAITS, f"wait for {address}", _at(timeline.wait, w))
        for i, kind in enumerate(("q", "k, v")):
            sent = Spans(timeline.send.start[:, :, w, i], timeline.send.end[:, :, w, i])
            yield from _slices(timeline, ENGINE, SENDER, f"send {kind}", sent)
        for microbatch in np.unique(timeline.rows["microbatch"]).tolist():
            thread = WIRE + microbatch * len(timeline.addresses) + w
            yield _name("thread", ENGINE, thread, f"wire {address}, microbatch {microbatch}")
            for name, spans in (("wire out", timeline.wire_out), ("wire back", timeline.wire_back)):
                yield from _slices(timeline, ENGINE, thread, name, _at(spans, w), microbatch)


def _steps(timeline: Timeline) -> Iterator[Event]:
    _, first = np.unique(timeline.rows["count"], return_index=True)
    for row in first:
        step = int(timeline.rows["step"][row])
        began, ended = timeline.steps.start[row], timeline.steps.end[row]
        yield _slice(timeline, ENGINE, STEPS, f"step {step}", began, ended, {"step": step})


def _slices(
    timeline: Timeline, process: int, thread: int, name: str, spans: Spans, microbatch: int | None = None
) -> Iterator[Event]:
    """The spans [R, L] that there are, of all microbatches or one."""
    there = spans.end > 0
    if microbatch is not None:
        there &= (timeline.rows["microbatch"] == microbatch)[:, None]
    for row, layer in np.argwhere(there).tolist():
        place = timeline.rows[row]
        of = {"step": int(place["step"]), "microbatch": int(place["microbatch"]), "layer": layer}
        yield _slice(timeline, process, thread, name, spans.start[row, layer], spans.end[row, layer], of)


def _slice(
    timeline: Timeline, process: int, thread: int, name: str, start: Any, end: Any, of: dict[str, int]
) -> Event:
    since = int(start - timeline.steps.start[0])
    times = {"ts": since / 1e3, "dur": int(end - start) / 1e3}
    return {"name": name, "ph": "X", "pid": process, "tid": thread, **times, "args": of}


def _name(what: str, process: int, thread: int, name: str) -> Event:
    return {"name": f"{what}_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _at(spans: Spans, i: int) -> Spans:
    return Spans(spans.start[..., i], spans.end[..., i])
