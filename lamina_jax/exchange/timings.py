"""When what happened in the last steps over attention workers, in arrays that are made before.

Whoever sends, waits or receives notes the time of it here, on the engine's monotonic clock; what a worker
notes is on its own. What follows from it is the concern of `lamina_jax.exchange.timeline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from time import monotonic_ns

import numpy as np

from lamina_jax.exchange.frames import Header, Kind

STEPS = 64
"""That are kept, the last ones."""

ROWS = 256
"""Microbatches of kept steps: n and one of prefill in a step. It divides 2^32, where their count wraps."""

Q_READY, Q_SENT, KV_READY, KV_SENT, RECEIVED, DONE, WAITED, ANSWERED = range(8)
"""What is noted of a layer: q, or q with k and v, was computed and in the kernel's hands; k and v likewise;
the worker received q, and had its part computed (its clock); the loop began to wait, and had the answer."""

ROW = np.dtype([(name, np.int64) for name in ("count", "step", "microbatch", "step_began", "began")])
"""A microbatch's step: the number of the step among all and as the scheduler counts, and when both began."""

OFFSET_TRIES = 8


class Stamps:
    """What one worker's frames were: `ns` int64[ROWS, L, 8], 0 where nothing has been noted."""

    def __init__(self, layers: int) -> None:
        self.ns = np.zeros((ROWS, layers, 8), np.int64)

    def sent(self, header: Header, ready_ns: int) -> None:
        """The frame of `header`, computed by then, is in the kernel's hands now."""
        row, first = header.step % ROWS, KV_READY if header.kind == Kind.KV else Q_READY
        self.ns[row, header.layer, first] = ready_ns
        self.ns[row, header.layer, first + 1] = monotonic_ns()

    def waits(self, header: Header) -> None:
        """The loop begins to wait for an answer."""
        self.ns[header.step % ROWS, header.layer, WAITED] = monotonic_ns()

    def answered(self, header: Header) -> None:
        """An answer is here; it may be another than the one that is waited for."""
        if header.layer < self.ns.shape[1]:
            times = self.ns[header.step % ROWS, header.layer]
            times[RECEIVED], times[DONE] = header.received_ns, header.done_ns
            times[ANSWERED] = monotonic_ns()


class Timings:
    """The last steps of an engine over W workers of L layers.

    Attributes:
        addresses: of the workers.
        workers: what was noted of each.
        offsets_ns: about how much each worker's clock is ahead of the engine's.
        rows: of `ROW`, as many as `ROWS`.
    """

    def __init__(self, layers: int, addresses: Sequence[str]) -> None:
        self.addresses, self._layers = tuple(addresses), layers
        self.workers = tuple(Stamps(layers) for _ in addresses)
        self.rows = np.zeros(ROWS, ROW)
        self.restart([0] * len(addresses), lambda: 0)

    def restart(self, offsets_ns: Sequence[int], sender_cpu_ns: Callable[[], int]) -> None:
        """Forget all steps: the workers are connected anew, by a sender that has used so much CPU time."""
        self.offsets_ns, self._sender_cpu_ns = tuple(offsets_ns), sender_cpu_ns
        self._begun, self._step, self._step_began = 0, 0, 0
        self._forget()

    def begin_step(self, step: int) -> None:
        """A step begins; step 0 begins a new count, and what came before (a warm-up) is forgotten."""
        if step == 0:
            self._forget()
        self._begun, self._step, self._step_began = self._begun + 1, step, monotonic_ns()
        self._step_rows, self._step_cpu_ns = 0, self._cpu_ns()

    def begin(self, header: Header) -> None:
        """A microbatch of the step begins."""
        row = header.step % ROWS
        for stamps in self.workers:
            stamps.ns[row] = 0
        self.rows[row] = (self._begun, self._step, header.microbatch, self._step_began, monotonic_ns())
        self._step_rows += 1

    def begin_layers(self) -> None:
        """From here on the step's dispatch goes from layer to layer, and does nothing else."""
        self._layers_cpu_ns = self._cpu_ns()

    def end_dispatch(self) -> None:
        """All of the step has been dispatched by the thread that began it."""
        now = self._cpu_ns()
        self._host_ns += now - self._step_cpu_ns
        self._hops_ns += now - self._layers_cpu_ns
        self._host_steps += 1
        self._hops += self._step_rows * (self._layers - 1)

    def end_step(self) -> None:
        """The first of the steps that had not ended has been read."""
        self._ended += 1

    def host(self) -> dict[str, float]:
        """CPU time of the loop's and the sender's thread since the last restart, in microseconds: `host`,
        of a step's dispatch; `host_per_hop`, of what it does for one more layer of one microbatch."""
        return {
            "host": 1e-3 * self._host_ns / max(self._host_steps, 1),
            "host_per_hop": 1e-3 * self._hops_ns / max(self._hops, 1),
        }

    def _cpu_ns(self) -> int:
        return time.thread_time_ns() + self._sender_cpu_ns()

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the rows known, in the order in which they began; which of them are of ended steps)."""
        count = self.rows["count"]
        known = np.flatnonzero(count > max(self._first, self._ended - STEPS))
        known = known[np.lexsort((self.rows["began"][known], count[known]))]
        return known, count[known] <= self._ended

    def _forget(self) -> None:
        self._first = self._ended = self._begun
        if not self._begun:
            self.rows["count"] = 0
        self._host_ns, self._host_steps, self._hops_ns, self._hops = 0, 0, 0, 0


def clock_offset(clock_ns: Callable[[], int]) -> int:
    """How far another host's clock is ahead of ours, in nanoseconds: asked some times, the fastest answer
    counts, and was read half way. It is wrong by half of what that answer took, at most."""
    asked = []
    for _ in range(OFFSET_TRIES):
        before = monotonic_ns()
        clock = clock_ns()
        after = monotonic_ns()
        asked.append((after - before, clock - (before + after) // 2))
    return min(asked)[1]
