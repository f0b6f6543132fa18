"""How signals end the commands that serve."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from lamina_jax.command import SAME_SIGNAL_SECONDS, end_by_signal


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of the tests come back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_ends_at_once_but_not_the_same_one_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    ended = threading.Event()
    end_by_signal(ended)
    signal.raise_signal(signal.SIGTERM)
    assert ended.is_set()
    signal.raise_signal(signal.SIGTERM)  # by a terminal, and by a program that passes it on
    assert codes == []
    later = time.monotonic() + 2 * SAME_SIGNAL_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    signal.raise_signal(signal.SIGINT)
    assert codes == [1]
