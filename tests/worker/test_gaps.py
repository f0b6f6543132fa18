"""Pulled KV is written between two frames of decoding."""

from __future__ import annotations

import threading
import time

from lamina_jax.worker import gaps
from lamina_jax.worker.gaps import Gaps


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
