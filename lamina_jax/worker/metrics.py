"""What a worker tells Prometheus. It only looks; nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lamina_jax.worker.leases import Leases


class WorkerMetrics(Collector):
    """Reads the leases' state when asked.

    Args:
        unused_memory: bytes that are free on the devices now.
    """

    def __init__(self, leases: Leases, unused_memory: Callable[[], int]) -> None:
        self._leases, self._unused_memory = leases, unused_memory

    def collect(self) -> Iterator[Metric]:
        held, traffic = self._leases.held, self._leases.traffic
        yield _gauge("lease_held", "Whether an engine has the worker.", bool(held))
        yield _gauge("memory_free_bytes", "Free memory of its devices.", self._unused_memory())
        pages = held[0].spec.geometry.num_pages if held else 0  # of all leases as many
        yield _gauge("pages", "KV pages that it holds for the engine.", pages)
        for unit in ("frames", "bytes"):
            text = f"{unit.capitalize()} of the data stream since the worker started, headers included."
            counter = CounterMetricFamily(f"lamina_worker_{unit}", text, labels=["direction"])
            for direction in ("received", "sent"):
                counter.add_metric([direction], getattr(traffic, f"{unit}_{direction}"))
            yield counter

    def serve(self, port: int) -> WSGIServer:
        """Offer /metrics on 127.0.0.1.

        Raises:
            OSError: the port cannot be listened on.
        """
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, "127.0.0.1", registry)
        return server


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lamina_worker_{name}", text, value)
