"""The rotational staggered pipeline (paper 4.3): who computes what, when, and on which replica.

It owns the schedule as pure functions of the microbatches and the number of model replicas. It knows
nothing of requests, programs, devices or jax; the decode loop and the simulator follow the same order.

n microbatches share r = max(1, n - 1) model replicas and one memory mesh, which works on one
microbatch at a time. A slice takes r times as long as an attention, which is the unit of time here.
While one microbatch is on the memory mesh, the replicas work on the others:

    n = 3    unit        0   1   2   3   4   5   6   7   8
             replica 0   a0  a0  c0  c0  b1  b1  a2  a2  ..     a, b, c: microbatches 0, 1, 2
             replica 1       b0  b0  a1  a1  c1  c1  b2  ..     a1: its slice 1
             memory              a0  b0  c0  a1  b1  c1  ..

With n = 1 there is nothing to overlap: slice and attention follow each other.

The last slice of a step, the sampler and the first slice of the next step run back to back on one
replica and count as one slice, so a step of L attentions has L slices and k counts on across steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PipelineEvent:
    """One slice on a model replica, or one attention on the memory mesh.

    Attributes:
        kind: "slice" or "attention".
        microbatch: j.
        k: slice number; attention k follows slice k.
        replica: the model replica of a slice; None for attention.
        start: when it starts, in attention times.
        length: how long it takes, in attention times.
    """

    kind: Literal["slice", "attention"]
    microbatch: int
    k: int
    replica: int | None
    start: int
    length: int

    @property
    def end(self) -> int:
        """The first unit after it."""
        return self.start + self.length


def num_replicas(microbatches: int) -> int:
    """r = max(1, n - 1): as many model replicas as there are microbatches off the memory mesh.

    Raises:
        ValueError: there is no microbatch.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    return max(1, microbatches - 1)


def replica_of(microbatch: int, k: int, replicas: int) -> int:
    """The replica of slice k of microbatch j: (j + k) mod r, so the next slice is on the next replica."""
    return (microbatch + k) % replicas


def schedule(n: int, num_slices: int) -> tuple[PipelineEvent, ...]:
    """The steady rotation of n microbatches over `num_slices` slices each, in order of start.

    Slice (j, k) starts at j + k (r + 1), where r + 1 = n for n >= 2, and lasts r; attention (j, k)
    takes the unit that follows. For n >= 2 no two events meet on one device, and from its first event
    on no device waits.

    Raises:
        ValueError: n is below 1.
    """
    replicas = num_replicas(n)
    events: list[PipelineEvent] = []
    for k, microbatch, replica in dispatch_order(range(n), num_slices, replicas):
        start = microbatch + k * (replicas + 1)
        events += [
            PipelineEvent("slice", microbatch, k, replica, start=start, length=replicas),
            PipelineEvent("attention", microbatch, k, None, start=start + replicas, length=1),
        ]
    return tuple(sorted(events, key=lambda event: event.start))


def dispatch_order(
    microbatches: Sequence[int], num_slices: int, replicas: int, *, first_slice: int = 0
) -> Iterator[tuple[int, int, int]]:
    """The order in which the host dispatches a step: slice k of every microbatch in turn, then k + 1.

    Args:
        microbatches: those of the step, in the order of its plan; a prefill microbatch, which joins
            for one step, is one more of them.
        num_slices: slices of the step.
        replicas: r, the model replicas there are.
        first_slice: the number of this step's first slice in the count across steps; it decides where
            the rotation over replicas goes on.

    Yields:
        (k, microbatch, replica), k counted from 0 in this step.
    """
    for k in range(num_slices):
        for microbatch in microbatches:
            yield k, microbatch, replica_of(microbatch, first_slice + k, replicas)
