"""Compiling in parallel: every job once, progress, and an end at the first error."""

from __future__ import annotations

import threading
import time

import pytest

from lamina_jax.compilation import compile_all


def test_every_job_runs_and_is_reported() -> None:
    ran: list[int] = []
    reports: list[tuple[int, int]] = []
    jobs = [(str(i), lambda i=i: ran.append(i)) for i in range(5)]
    compile_all(jobs, lambda done, total: reports.append((done, total)))
    assert sorted(ran) == list(range(5))
    assert reports == [(done, 5) for done in range(6)]


def test_an_error_does_not_wait_for_what_is_being_compiled() -> None:
    release = threading.Event()

    def slow() -> None:
        release.wait(20)

    def fail() -> None:
        raise ValueError("bad program")

    began = time.monotonic()
    with pytest.raises(ValueError, match="bad program"):
        compile_all([("bad", fail), ("slow", slow), *[("slow", slow)] * 50], lambda done, total: None)
    assert time.monotonic() - began < 10
    release.set()
