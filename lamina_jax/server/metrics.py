"""What the server tells Prometheus, under vLLM's names and with their meanings.

A request is here one choice of one prompt: what the engine decodes. Of requests the server counts what it
sees; of the engine it repeats what `Engine.stats` said last. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "lamina:"

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**zeros) for zeros in range(6) for digit in (1, 2, 5))

ENGINE_GAUGES = {
    "requests_running": ("num_requests_running", "Requests that are decoded or prefilled."),
    "requests_waiting": ("num_requests_waiting", "Requests that wait for a seat or for pages."),
    "pages_free": ("pages_free", "KV pages that nobody holds."),
    "pages_used": ("pages_used", "KV pages that requests hold."),
    "pages_total": ("pages_total", "KV pages in all."),
    "microbatches": ("microbatches", "Microbatches that the decoding rows are split into."),
    "wire_bytes_per_step": ("wire_bytes_per_step", "Mean bytes of q, k, v and o that a step sends."),
    "wire_messages_per_step": ("wire_messages_per_step", "Mean messages that a step sends."),
    "wire_metadata_bytes_per_step": ("wire_metadata_bytes_per_step", "Mean bytes of a step's metadata."),
    "host_microseconds_per_step": ("host_microseconds_per_step", "Mean of the host's own work."),
    "prefill_hosts_up": ("prefill_hosts_up", "Prefill hosts that answer."),
}
"""Keys of `Engine.stats`, their names here, and what they mean."""

ENGINE_COUNTERS = {
    "steps": ("engine_steps", "Steps that the engine has dispatched."),
    "preemptions": ("num_preemptions", "Requests that gave up their pages and were computed anew."),
    "compilations_after_ready": (
        "compilations_after_ready",
        "Programs compiled since the start; ought to be 0.",
    ),
    "prefill_prompts": ("prefill_prompts", "Prompts that prefill hosts have prefilled."),
    "prefill_tokens": ("prefill_tokens", "Tokens of those prompts."),
    "prefill_pulled_bytes": ("prefill_pulled_bytes", "Bytes of their KV that workers have pulled."),
    "prefill_retries": ("prefill_retries", "Tries on a prefill host that failed or was busy."),
    "prefill_fallbacks": ("prefill_fallbacks", "Prompts prefilled here since no prefill host could."),
}


class ServerMetrics(Collector):
    """One server's counters. `engine` holds the last `Engine.stats`, empty before the first.

    Args:
        model: the name under which the model is served, the label of all that is here.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.engine: Mapping[str, Any] = {}
        self.worker_lost = False
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts whose first token came.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self.queue = self._histogram(
            "request_queue_time_seconds", "For which a prompt waited in the engine's queue.", REQUEST_SECONDS
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the HTTP request to its first token.", FIRST_TOKEN_SECONDS
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "From a request's token to its next.", BETWEEN_TOKENS_SECONDS
        )
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From the HTTP request to its last token.", REQUEST_SECONDS
        )
        self.prompt_lengths = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", TOKENS
        )
        self.generated_lengths = self._histogram(
            "request_generation_tokens", "Tokens that a request was given.", TOKENS
        )
        self._ended = Counter(
            f"{PREFIX}request_success",
            "Requests that have ended, by how: stop, length, abort or error.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.ended(reason)  # a series that is there from the start can be watched for changes

    def ended(self, reason: str) -> Counter:
        """Of the requests that have ended so."""
        return self._ended.labels(self._model, reason)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine says. Called by the registry."""
        yield self._family(
            GaugeMetricFamily, "worker_lost", "1 while an attention worker is lost.", self.worker_lost
        )
        for kind, table in ((GaugeMetricFamily, ENGINE_GAUGES), (CounterMetricFamily, ENGINE_COUNTERS)):
            for key, (name, text) in table.items():
                if key in self.engine:
                    yield self._family(kind, name, text, self.engine[key])
        if "pages_total" in self.engine:
            text = "Share of the KV pages that requests hold; 1 is full."
            usage = self.engine["pages_used"] / max(self.engine["pages_total"], 1)
            yield self._family(GaugeMetricFamily, "kv_cache_usage_perc", text, usage)

    def _family(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, value: float
    ) -> Metric:
        family = kind(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, ("model_name",), registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)
