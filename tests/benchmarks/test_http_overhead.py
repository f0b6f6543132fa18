"""What HTTP costs: figures, goal, and the command."""

from __future__ import annotations

from typing import Any

import pytest
from serve_flags import arguments

from lamina_jax.benchmarks import http_overhead, serve
from lamina_jax.benchmarks.latencies import Record


def level(streams: int, alone: float, http: float) -> dict[str, Any]:
    """Two streams, one later than the other, with gaps of so many ms where both stream."""

    def figures(gap: float, processes: tuple[str, ...]) -> http_overhead.Figures:
        later = [1.0 + 1e-3 * gap * index for index in range(11)]
        arrivals = [[0.5, *later], later]
        records = [
            Record(sent=0.0, prompt_tokens=1, arrivals=times, counts=[1] * len(times)) for times in arrivals
        ]
        return http_overhead.figures(records, dict.fromkeys(processes, 0.0023))

    taken = {
        "alone": [figures(alone, ("engine",))],
        "http": [figures(http, ("client", "server", "engine"))],
    }
    return {"streams": streams, "tokens": 11, **http_overhead._compared(taken)}


def test_steady_gaps_are_those_while_all_stream() -> None:
    found = level(64, 2.0, 3.0)
    assert found["alone"]["steady_p99_ms"] == pytest.approx(2.0)
    assert found["alone"]["p99_ms"] > 100, "the first stream has waited for the second"
    assert found["alone"]["engine_cpu_us"] == pytest.approx(100)
    assert found["steady_p99_ratio"] == pytest.approx(1.5)
    assert found["microseconds_per_token"] == pytest.approx(1e6 * 0.010 / 23)
    early = Record(sent=0.0, prompt_tokens=1, arrivals=[0.1, 0.2], counts=[1, 1])
    late = Record(sent=0.3, prompt_tokens=1, arrivals=[0.1, 0.2], counts=[1, 1])
    assert http_overhead.figures([early, late], {})["steady_p99_ms"] is None


@pytest.mark.parametrize(("http", "verdict"), [(5.9, "steady: 1.97 x, met"), (9.0, "steady: 3.00 x, missed")])
def test_the_goal_of_the_overhead(capsys: pytest.CaptureFixture[str], http: float, verdict: str) -> None:
    http_overhead._print("some model", [level(1, 2.0, 3.0), level(64, 3.0, http)])
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(verdict)
    assert printed.count("through HTTP") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_of_its_own_and_the_engine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--placement", "collocated", "--max-model-len", "128", "--max-prefill-tokens", "32")
    flags = ("--quick", "--overhead", "--streams", 1, 6)
    results = serve.run(arguments(*flags, "--", *few, "--max-num-seqs", 4))
    for found, streams in zip(results["levels"], (1, 6), strict=True):
        assert found["alone"]["tokens"] == found["http"]["tokens"] == 32 * streams
        assert found["alone"]["p99_ms"] > 0
        assert found["http"]["engine_cpu_us"] > found["http"]["server_cpu_us"] > 0
    assert "CPU time per token, us" in capsys.readouterr().out
