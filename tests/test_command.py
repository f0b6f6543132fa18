"""How signals end the commands that serve."""

from __future__ import annotations

import os
import signal
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
    taken: list[int] = []
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    end_by_signal(taken.append)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # by a terminal, and by a program that passes it on
    assert (taken, codes) == ([signal.SIGTERM], [])
    later = time.monotonic() + 2 * SAME_SIGNAL_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    signal.raise_signal(signal.SIGINT)
    assert (taken, codes) == ([signal.SIGTERM], [128 + signal.SIGINT])
