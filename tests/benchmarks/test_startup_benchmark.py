"""`bench startup`: its phases, read from what the command says; and two starts of a real one."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lamina_jax.benchmarks import startup

SAID = """\
listening on http://127.0.0.1:1, loading bundled
importing jax, 0 s
loading weights, 1 s
slicing, 1 s
cpu:0 and cpu:1: query heads 0-1, KV head 0
compiling 0/47, 2 s
compiling 47/47, 2 s
compiling attention 0/14, 2 s
compiled 61 programs: 0 from the cache, 61 new, in 12.0 s
measuring prefill, 3 s
"""


def test_a_phase_lasts_until_the_next() -> None:
    lines = [(float(i**2), line) for i, line in enumerate(SAID.splitlines(), start=1)]
    assert startup.phases(lines, 120.0) == {
        "command and port": 4.0,
        "imports": 5.0,
        "weights": 7.0,
        "slicing and tracing": 20.0,
        "compiling": 28.0,
        "compiling attention": 36.0,
        "measuring prefill": 20.0,
    }


@pytest.mark.multi
@pytest.mark.slow
def test_two_starts(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--max-num-seqs", "1", "--max-prefill-tokens", "64", "--max-model-len", "128"]
    args = argparse.Namespace(model="bundled", rounds=1, server_flags=small)
    first, second = results = startup.run(args)
    assert [result["start"] for result in results] == ["first", "second"]
    assert first["from the cache"] == 0 < first["programs"]
    assert second["from the cache"] == second["programs"] == first["programs"]
    told: dict[str, Any] = dict(first)
    assert sum(told[phase] for phase in startup.PHASES.values()) == pytest.approx(first["ready"])
    assert "command to /ready; median of 1" in capsys.readouterr().out
