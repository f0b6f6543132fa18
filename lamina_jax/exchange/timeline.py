"""What the noted times say: who worked, what was on the wire, and which of it nothing hid.

docs/timings.md defines every figure. Knows nothing of how the times were noted, nor of any file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lamina_jax.exchange.timings import (
    ANSWERED,
    DONE,
    KV_READY,
    KV_SENT,
    Q_READY,
    Q_SENT,
    RECEIVED,
    WAITED,
    Timings,
)

FIGURES = ("compute", "wire_out", "attention", "wire_back", "exposed_wire")
LAYER = np.dtype([(name, np.int64) for name in ("step", "microbatch", "layer", *FIGURES)])


class Spans(NamedTuple):
    """Intervals on the engine's clock, start and end int64[R, L, ...] in ns; both 0 where there is none.

    R: a microbatch's step.
    """

    start: np.ndarray
    end: np.ndarray

    @property
    def length(self) -> np.ndarray:
        return self.end - self.start


class Timeline:
    """The kept steps.

    Attributes:
        rows: `lamina_jax.exchange.timings.ROW` [R], in the order in which they began.
        steps: began and ended [R], of the step that each is of.
        compute, send: of q, and of k and v; [R, L, 2], and [R, L, W, 2].
        wire_out, attention, wire_back, wait: [R, L, W].
        layers: `LAYER` [R, L], in ns.
    """

    def __init__(self, timings: Timings) -> None:
        known, ended = timings.select()
        rows = timings.rows[known]
        ns = np.stack([stamps.ns[known] for stamps in timings.workers], axis=2)
        ready, sent, answered = ns[..., [Q_READY, KV_READY]], ns[..., [Q_SENT, KV_SENT]], ns[..., ANSWERED]
        # The sender noted of a frame that was ready when its turn came when it was given: it had been
        # computed by then or, for all that is known, by when the frame before it had been.
        ready = _in_order(sent, ready)
        back = answered > 0
        offsets = [
            _offset(guess, ns[:, :, i], ready[:, :, i, 0], back[:, :, i])
            for i, guess in enumerate(timings.offsets_ns)
        ]
        received, done = (np.where(back, ns[..., i] - offsets, 0) for i in (RECEIVED, DONE))
        waited, taken = ns[..., WAITED], np.maximum(answered, ns[..., WAITED])
        came = np.where(waited <= answered, np.maximum(done, waited), done)

        compute = _in_turn(_inputs(rows, answered.max(axis=2)), ready.max(axis=2))
        send = _in_turn(ready, sent)
        wire_out, wire_back = _spans(ready[..., 0], received, back), _spans(came, answered, back)
        attention, wait = _spans(received, done, back), _spans(waited, taken, waited > 0)

        busy = _union(compute, attention)
        exposed = (wait.length - _covered(busy, wait)).sum(axis=2)
        last = np.concatenate([ready, sent, answered[..., None]], axis=-1).max(axis=(1, 2, 3), initial=0)
        steps = _steps(rows, last)

        def kept(spans: Spans) -> Spans:
            return Spans(spans.start[ended], spans.end[ended])

        self.rows, self.steps, self.addresses = rows[ended], kept(steps), timings.addresses
        self.compute, self.send, self.wait = kept(compute), kept(send), kept(wait)
        self.wire_out, self.attention, self.wire_back = kept(wire_out), kept(attention), kept(wire_back)
        self.layers = np.zeros(back.shape[:2], LAYER)
        self.layers["step"], self.layers["microbatch"] = rows["step"][:, None], rows["microbatch"][:, None]
        self.layers["layer"] = np.arange(back.shape[1])
        self.layers["compute"] = compute.length.sum(axis=2)
        for name, spans in (("wire_out", wire_out), ("attention", attention), ("wire_back", wire_back)):
            self.layers[name] = spans.length.max(axis=2)
        self.layers["exposed_wire"] = exposed
        self.layers = self.layers[ended]

    def sums(self) -> dict[str, float]:
        """The mean over the kept steps of each figure of `FIGURES`, summed over a step's layers and
        microbatches, and of `step`, how long it was; in microseconds. `steps`: how many they are."""
        _, first = np.unique(self.rows["count"], return_index=True)
        scale = 1e-3 / max(len(first), 1)
        found: dict[str, Any] = {name: scale * int(self.layers[name].sum()) for name in FIGURES}
        return {"steps": len(first), **found, "step": scale * int(self.steps.length[first].sum())}


def _spans(start: np.ndarray, end: np.ndarray, there: np.ndarray) -> Spans:
    """`start` .. `end` where `there`; the clocks of two hosts may differ by less than what is left of it."""
    end = np.where(there, end, 0)
    return Spans(np.where(there, np.minimum(start, end), 0), end)


def _in_order(sent: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """`ready` of frames that one sender sent at `sent`, none before the ready one of the frame before."""
    order = np.argsort(sent, axis=None, kind="stable")
    result = np.empty(ready.size, np.int64)
    result[order] = np.maximum.accumulate(ready.reshape(-1)[order])
    return np.where(sent > 0, result.reshape(ready.shape), 0)


def _in_turn(start: np.ndarray, end: np.ndarray) -> Spans:
    """Work of one device or thread, which does one thing after the other: each begins at its `start`, but
    not before the one before has ended. `start` may have fewer dimensions: it is the same for the last."""
    start = np.broadcast_to(start if start.ndim == end.ndim else start[..., None], end.shape).reshape(-1)
    flat = end.reshape(-1)
    order = np.argsort(flat, kind="stable")
    before = np.concatenate([[0], flat[order][:-1]])
    begun = np.empty_like(flat)
    begun[order] = np.minimum(np.maximum(start[order], before), flat[order])
    return Spans(begun.reshape(end.shape), end)


def _inputs(rows: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """[R, L]: when what a slice starts from was there: the answer of the layer before; of a step's first
    slice the last answer of the step before, if it came in this one, for its tokens; else its beginning."""
    inputs = np.maximum(rows["began"][:, None], np.roll(answered, 1, axis=1))
    last: dict[int, int] = {}
    for i, row in enumerate(rows):
        before = last.get(row["microbatch"], 0)
        inputs[i, 0] = before if before > row["step_began"] else row["began"]
        last[row["microbatch"]] = answered[i, -1]
    return inputs


def _offset(guess: int, ns: np.ndarray, ready: np.ndarray, back: np.ndarray) -> int:
    """A worker's clock, ahead of the engine's: as guessed, but no query came before it was sent, and no
    answer before it was done."""
    if not back.any():
        return guess
    least = int((ns[..., DONE] - ns[..., ANSWERED])[back].max())
    most = int((ns[..., RECEIVED] - ready)[back].min())
    return (least + most) // 2 if least > most else min(max(guess, least), most)


def _union(*some: Spans) -> Spans:
    """The times [n] that one of them covers, apart from each other and in order."""
    start = np.concatenate([spans.start.reshape(-1) for spans in some])
    end = np.concatenate([spans.end.reshape(-1) for spans in some])
    order = np.argsort(start)
    start, end = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate([[True], start[1:] > end[:-1]]) if len(start) else np.zeros(0, bool)
    groups = np.flatnonzero(first)
    return Spans(start[groups], np.maximum.reduceat(end, groups) if len(groups) else end)


def _covered(union: Spans, spans: Spans) -> np.ndarray:
    """How much of each span the union covers."""
    if not len(union.start):
        return np.zeros_like(spans.start)
    passed = np.concatenate([[0], np.cumsum(union.length)])

    def before(time: np.ndarray) -> np.ndarray:
        i = np.searchsorted(union.start, time, side="right") - 1
        inside = np.minimum(time - union.start[i], union.length[i])
        return np.where(i < 0, 0, passed[i] + inside)

    return before(spans.end) - before(spans.start)


def _steps(rows: np.ndarray, last: np.ndarray) -> Spans:
    """Each row's step: from its beginning to its last event, or to the beginning of the next, which comes
    first as long as there is work."""
    counts, first, of = np.unique(rows["count"], return_index=True, return_inverse=True)
    began = rows["step_began"][first]
    end = np.zeros(len(counts), np.int64)
    np.maximum.at(end, of, last)
    end[:-1] = np.minimum(end[:-1], began[1:])
    return Spans(began[of], np.maximum(end, began)[of])
