from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.engine.pipeline import dispatch_order, num_replicas, schedule

MANY = pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 9, 16])


def by_device(events):
    """Events of each replica (by number) and of the memory mesh (None), in order of start."""
    devices = defaultdict(list)
    for event in events:
        devices[event.replica].append(event)
    return devices


@MANY
def test_every_device_is_used(n):
    assert set(by_device(schedule(n, 5))) == {None, *range(n - 1)}


@MANY
def test_no_two_events_meet_and_no_device_waits(n):
    for device, events in by_device(schedule(n, 3 * n)).items():
        assert events[0].start == (n - 1 if device is None else device), "a device starts late"
        for before, after in pairwise(events):
            assert before.end == after.start, f"{before} and {after} on device {device}"


@MANY
def test_a_microbatch_goes_from_slice_to_attention_to_the_next_slice(n):
    at = {(event.kind, event.microbatch, event.k): event for event in schedule(n, 2 * n)}
    assert len(at) == 2 * n * 2 * n
    for (kind, microbatch, k), event in at.items():
        if kind == "slice":
            assert at["attention", microbatch, k].start == event.end
            assert event.length == n - 1
        elif k + 1 < 2 * n:
            following = at["slice", microbatch, k + 1]
            assert following.start >= event.end
            assert following.replica == (at["slice", microbatch, k].replica + 1) % (n - 1)


def test_one_microbatch_runs_in_order():
    events = schedule(1, 4)
    assert [(event.kind, event.k) for event in events] == [
        (kind, k) for k in range(4) for kind in ("slice", "attention")
    ]
    assert all(before.end == after.start for before, after in pairwise(events))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_slices_are_dispatched_in_the_order_of_their_start(n):
    slices = [event for event in schedule(n, 7) if event.kind == "slice"]
    order = list(dispatch_order(range(n), 7, num_replicas(n)))
    assert order == [(event.k, event.microbatch, event.replica) for event in slices]


def test_a_prefill_microbatch_joins_for_one_step():
    assert list(dispatch_order([0, 1, 2], 2, 1)) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (1, 0, 0),
        (1, 1, 0),
        (1, 2, 0),
    ]


@settings(deadline=None, max_examples=50)
@given(
    microbatches=st.lists(st.integers(0, 8), unique=True, max_size=6),
    lengths=st.lists(st.integers(0, 5), max_size=4),
    replicas=st.integers(1, 5),
)
def test_the_rotation_goes_on_across_steps(microbatches, lengths, replicas):
    whole = list(dispatch_order(microbatches, sum(lengths), replicas))
    steps, first = [], 0
    for length in lengths:
        step = dispatch_order(microbatches, length, replicas, first_slice=first)
        steps += [(first + k, microbatch, replica) for k, microbatch, replica in step]
        first += length
    assert steps == whole


def test_no_microbatch_is_refused():
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        schedule(0, 1)
