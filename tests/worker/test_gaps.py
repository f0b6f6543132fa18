"""Pulled KV is written between two frames of decoding."""

from __future__ import annotations

import threading
import time

import pytest

from lamina_jax.worker import gaps
from lamina_jax.worker.gaps import Appends, Gaps


def test_a_write_waits_for_the_end_of_a_frame() -> None:
    it, events = Gaps(), []

    def write() -> None:
        with it.gap():
            events.append("write")

    with it.frame():
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.05)
        events.append("frame")
    writer.join(5)
    assert events == ["frame", "write"]


def test_one_write_after_each_frame_and_no_waiting_when_it_is_quiet(monkeypatch) -> None:
    monkeypatch.setattr(gaps, "QUIET_SECONDS", 30.0)
    it, written = Gaps(), []
    it._last_frame = time.monotonic() - 60  # long quiet
    with it.gap():
        written.append(0)
    with it.frame():
        pass
    with it.gap():
        written.append(1)

    def write() -> None:
        with it.gap():
            written.append(2)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.2)
    assert written == [0, 1]
    with it.frame():
        pass
    writer.join(5)
    assert written == [0, 1, 2]


@pytest.mark.parametrize("last", [5, 2**32 - 1, 0])
def test_a_step_is_over_when_its_last_k_and_v_have_come(last: int) -> None:
    """And those before it; steps are counted anew after 2^32."""
    it, before = Appends(), (last - 1) % 2**32
    it.begin(0, before, appends=True)
    it.begin(1, last, appends=True)
    assert not it.wait(before, 0)
    it.end(1)
    assert not it.wait(last, 0)
    it.end(0)
    assert it.wait(before, 0)
    assert it.wait(last, 0)
    assert not it.wait((last + 1) % 2**32, 0)  # which has not begun


def test_a_step_that_appends_nothing_is_not_waited_for() -> None:
    it = Appends()
    assert it.wait(0, 0)
    it.begin(0, 1, appends=False)
    assert it.wait(1, 0)
    it.begin(0, 2, appends=True)
    assert it.wait(1, 0)
