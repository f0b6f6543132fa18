"""`/metrics`: Prometheus can read it, and after known requests it says exactly what happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_server import DEADLINE, NUM_PAGES, FakeEngine, Running, in_thread, pages_are_back, running
from prometheus_client.parser import text_string_to_metric_families

from lamina_jax.core import CompletionOutput, FinishReason, RequestOutput
from lamina_jax.server.call_meter import CallMeter
from lamina_jax.server.metrics import ServerMetrics
from lamina_jax.server.request_log import RequestRecord

Report = Callable[[str, int, int], None]


def read(page: bytes, model: str = "m") -> dict[str, float]:
    """The samples of a model, by name and any other label."""
    values = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("lamina:"):
                assert labels.pop("model_name") == model
                assert family.documentation
            values[" ".join([sample.name.removeprefix("lamina:"), *labels.values()])] = sample.value
    return values


def news(tokens: int, reason: FinishReason | None = None, *, choice: int = 0) -> RequestOutput:
    output = CompletionOutput(index=choice, token_ids=[5] * tokens, finish_reason=reason)
    return RequestOutput(request_id="call-0", outputs=[output])


class Clock:
    """Stands in for the time since a request began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(RequestRecord, "elapsed", lambda record: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_request_from_its_first_token_to_its_last(clock: Clock) -> None:
    metrics, record = ServerMetrics("m"), RequestRecord(request_id="r")
    meter = CallMeter(metrics, record, "cmpl-1", [7], 1)
    clock.now = 0.05
    meter.take(0, replace(news(1), queue_seconds=0.01))
    clock.now = 0.09
    meter.take(0, news(2))
    clock.now = 1.7
    meter.take(0, news(1, "length"))
    meter.close(None)
    values = read(metrics.page())
    assert values["prompt_tokens_total"] == 7
    assert values["generation_tokens_total"] == 4
    assert values["request_queue_time_seconds_count"] == 1
    assert values["request_queue_time_seconds_sum"] == pytest.approx(0.01)
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["time_to_first_token_seconds_sum"] == pytest.approx(0.05)
    assert values["time_to_first_token_seconds_bucket 0.04"] == 0
    assert values["time_to_first_token_seconds_bucket 0.06"] == 1
    assert values["inter_token_latency_seconds_count"] == 2
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(1.65)
    assert values["e2e_request_latency_seconds_sum"] == pytest.approx(1.7)
    assert values["request_prompt_tokens_bucket 5.0"] == 0
    assert values["request_prompt_tokens_bucket 10.0"] == 1
    assert values["request_generation_tokens_sum"] == 4
    ended = {
        reason: values[f"request_success_total {reason}"] for reason in ("stop", "length", "abort", "error")
    }
    assert ended == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert (record.prompt_tokens, record.completion_tokens, record.first_token_seconds) == (7, 4, 0.05)
    assert (record.fields()["finish_reason"], record.fields()["queue_s"]) == ("length", 0.01)


@pytest.mark.parametrize(("error", "reason"), [(None, "abort"), ("worker_lost", "error")])
def test_what_has_not_ended_when_its_call_does(clock: Clock, error: str | None, reason: str) -> None:
    metrics, record = ServerMetrics("m"), RequestRecord(request_id="r")
    meter = CallMeter(metrics, record, "cmpl-1", [3, 4], 2)
    clock.now = 1.0
    meter.take(1, news(2, "stop", choice=1))
    meter.take(0, news(1))
    meter.close(error)
    meter.close(error)
    values = read(metrics.page())
    assert values[f"request_success_total {reason}"] == 3
    assert values["request_success_total stop"] == 1
    assert values["e2e_request_latency_seconds_count"] == 1
    assert values["prompt_tokens_total"] == 7
    assert values["generation_tokens_total"] == 3
    assert record.fields() | {"total_s": 0} == {
        "request_id": "r",
        "call_id": "cmpl-1",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "first_token_s": 1.0,
        "total_s": 0,
        "finish_reason": f"{reason},stop" if reason < "stop" else f"stop,{reason}",
        **({} if error is None else {"error": error}),
    }


def test_what_the_engine_says() -> None:
    metrics = ServerMetrics("m")
    assert "num_requests_running" not in read(metrics.page())
    metrics.engine = {
        "requests_running": 3,
        "requests_waiting": 2,
        "pages_free": 6,
        "pages_used": 2,
        "pages_total": 8,
        "steps": 11,
        "preemptions": 4,
        "compilations_after_ready": 0,
        "microbatches": 2,
        "wire_bytes_per_step": 12.5,
        "placement": "disaggregated",
    }
    metrics.worker_lost = True
    values = read(metrics.page())
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "pages_free": 6,
        "pages_used": 2,
        "pages_total": 8,
        "engine_steps_total": 11,
        "num_preemptions_total": 4,
        "compilations_after_ready_total": 0,
        "microbatches": 2,
        "wire_bytes_per_step": 12.5,
        "worker_lost": 1,
    }
    assert {name: values[name] for name in expected} == expected


def test_the_servers_process_is_told_of() -> None:
    assert read(ServerMetrics("m").page())["process_resident_memory_bytes"] > 2**20


def scrape(server: Running) -> dict[str, float]:
    response = server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return read(response.content, "fake")


def test_requests_over_http() -> None:
    with running(FakeEngine().build) as server:
        before = scrape(server)
        assert before["request_success_total length"] == 0
        server.complete("hello", max_tokens=7)
        server.complete(["ab", "c"], max_tokens=3, n=2, stream=True)
        assert server.complete("a" * 1000).status_code == 400
        server.wait_for("/stats", pages_are_back)
        values = scrape(server)
        expected = {
            "prompt_tokens_total": 5 + 2 * (2 + 1),
            "generation_tokens_total": 7 + 3 * 4,
            "request_success_total length": 5,
            "request_success_total abort": 0,
            "time_to_first_token_seconds_count": 5,
            "inter_token_latency_seconds_count": 6 + 2 * 4,
            "e2e_request_latency_seconds_count": 5,
            "request_prompt_tokens_sum": 11,
            "request_generation_tokens_bucket 5.0": 4,
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "num_preemptions_total": 0,
            "compilations_after_ready_total": 0,
            "worker_lost": 0,
        }
        assert {name: values[name] for name in expected} == expected


def test_a_client_that_leaves_is_an_abort() -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.step_seconds = 0.02
        body = {"model": "fake", "prompt": "a", "max_tokens": 100, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_raw())
        server.wait_for("/stats", pages_are_back)
        values = scrape(server)
        assert values["request_success_total abort"] == 1
        assert 0 < values["generation_tokens_total"] < 100
        assert values["e2e_request_latency_seconds_count"] == 0


def test_an_engine_that_hangs_does_not_hang_a_scrape() -> None:
    fake = FakeEngine()
    with running(fake.build) as server:
        fake.runner.gate.clear()
        thread, _ = in_thread(lambda: server.complete("a", max_tokens=5))
        assert fake.runner.reading.wait(DEADLINE)
        started = time.monotonic()
        assert scrape(server)["pages_total"] == scrape(server)["pages_free"]  # as it was at its start
        assert time.monotonic() - started < 10
        fake.runner.gate.set()
        thread.join(DEADLINE)
        assert scrape(server)["generation_tokens_total"] == 5


def test_before_the_engine_is_ready() -> None:
    def slow(report: Report) -> None:
        assert may_go_on.wait(DEADLINE)

    may_go_on = threading.Event()
    with running(FakeEngine(before=slow).build, ready=False) as server:
        values = scrape(server)
        assert values["request_success_total stop"] == 0
        assert "pages_total" not in values
        may_go_on.set()
        server.wait_ready()
        assert scrape(server)["pages_total"] == NUM_PAGES
