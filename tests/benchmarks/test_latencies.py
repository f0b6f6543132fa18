"""The figures of a load, by hand."""

from __future__ import annotations

import pytest

from lamina_jax.benchmarks.latencies import Record, goodput, summary


def test_figures_by_hand() -> None:
    records = [
        Record(sent=0.0, prompt_tokens=4, arrivals=[0.1, 0.2, 0.4], counts=[1, 1, 1]),
        Record(sent=1.0, prompt_tokens=6, arrivals=[0.3, 0.5], counts=[1, 4]),
        Record(sent=2.0, prompt_tokens=8, arrivals=[0.2], counts=[1]),
        Record(sent=2.0, prompt_tokens=9, arrivals=[9.9], counts=[1], error="HTTP 429"),
    ]
    figures = summary(records, 2.0)
    assert figures["requests_ok"] == 3
    assert figures["requests_failed"] == 1
    assert figures["errors"] == {"HTTP 429": 1}
    assert figures["requests_per_second"] == 1.5
    assert figures["prompt_tokens"] == 18
    assert figures["output_tokens"] == 9
    assert figures["output_tokens_per_second"] == 4.5
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)
    assert figures["ttft_ms"]["max"] == pytest.approx(300)
    assert figures["tpot_ms"]["mean"] == pytest.approx((150 + 50) / 2), "of those with two tokens or more"
    assert figures["itl_ms"]["mean"] == pytest.approx((100 + 200 + 200) / 3), "an event is an arrival"
    assert figures["e2e_ms"]["p50"] == pytest.approx(400)
    assert goodput(records, 2.0, ttft_ms=200.001, tpot_ms=None) == 1.0
    assert goodput(records, 2.0, ttft_ms=None, tpot_ms=60) == 1.0, "one token has no TPOT"
    assert goodput(records, 2.0, ttft_ms=250, tpot_ms=60) == 0.5


def test_figures_where_nothing_came() -> None:
    figures = summary([Record(sent=0.0, prompt_tokens=1, error="ClientConnectorError")], 1.0)
    assert figures["output_tokens"] == 0
    assert [figures[f"{name}_ms"] for name in ("ttft", "tpot", "itl", "e2e")] == [None] * 4
