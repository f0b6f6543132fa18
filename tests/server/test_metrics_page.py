"""docs/operations.md names every metric there is, and none that there is not."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lamina_jax.server.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, ServerMetrics

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_page_has_a_row_for_each_metric() -> None:
    metrics = ServerMetrics("m")
    metrics.engine = dict.fromkeys([*ENGINE_GAUGES, *ENGINE_COUNTERS], 1)
    families = text_string_to_metric_families(metrics.page().decode())
    rows = []
    for family in families:
        name = family.name + "_total" * (family.type == "counter")
        if name.startswith("lamina:") and not name.endswith("_created"):  # those are Prometheus' own
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("| `lamina:")]
    assert sorted(found) == sorted(rows), "\n".join(sorted(rows))
