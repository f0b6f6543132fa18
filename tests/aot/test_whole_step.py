"""Both sides of a decode step compile for devices that are not there, and say what they need of them."""

from __future__ import annotations

from typing import Any

import pytest

from lamina_jax.aot.cases import chosen
from lamina_jax.aot.devices import Topology
from lamina_jax.aot.worker import missing
from lamina_jax.benchmarks import aot

pytestmark = [pytest.mark.aot, pytest.mark.timeout(580)]

LOAD: dict[str, Any] = {"rows": 32, "context": 4096, "kv_dtype": "auto"}


def compiled(name: str) -> dict[str, Any]:
    (case,) = chosen([name])
    if lacking := missing(Topology(case.topology).kind.platform):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    (result,) = aot.compile_cases([case], LOAD)
    return result


@pytest.mark.parametrize(
    ("name", "hosts", "weights"),
    [
        ("compute llama3-70b v5e:4x4", 4, 70.55e9 * 2 / 16),
        ("compute llama3-70b h100:2x8", 2, 70.55e9 * 2 / 16),
        ("compute qwen3-0.6b v6e:2x2", 1, 0.596e9 * 2 / 4),
    ],
)
def test_the_layers_are_five_programs_and_move_two_sums_per_layer(
    name: str, hosts: int, weights: float
) -> None:
    """Two stages of the first slice and of all that are like the second, and the last slice."""
    result = compiled(name)
    names = [program["name"].partition(" (")[2].partition(")")[0] for program in result["programs"]]
    assert sorted(names) == ["32, 1", "last", "query", "query", "rest", "rest"]
    assert result["hosts"] == hosts
    # KV heads that outnumber none are repeated, and norms are everywhere.
    assert result["needs"]["weights"] == pytest.approx(weights, rel=0.05)
    assert result["layer"] == {"all-reduce": 2}
    assert aot.refusal(result) == ""


@pytest.mark.parametrize("kind", ["v5e:2x2", "v6e:2x2", "h100:1", "h20:1", "l40s:2"])
def test_attention_reads_pages_where_they_lie(kind: str) -> None:
    result = compiled(f"memory llama3-70b {kind}")
    assert sorted(program["name"].split()[0] for program in result["programs"]) == ["append", "attend"]
    tokens, bytes_per_token = 32 * 4096, 80 * 2 * 8 * 128 * 2
    assert result["needs"]["pages"] == tokens * bytes_per_token // result["devices"]
    layer = result["needs"]["pages"] // 80
    for program in result["programs"]:
        assert program["collectives"] == {}
        assert program["temporaries"] < layer / 4, "the pages are copied"
        assert not program["kernels"]["spilled"]


def test_what_does_not_fit_is_refused_before_it_is_compiled() -> None:
    for name in ("compute llama3-70b v5e:2x4", "memory llama3-70b v5e:1x1"):
        result = compiled(name)
        assert result["programs"] == []
        assert aot.refusal(result).startswith("does not fit: needs")


@pytest.mark.parametrize("kind", ["v5e:2x2", "h100:4"])
def test_the_sampler_compiles(kind: str) -> None:
    result = compiled(f"sampler qwen3-0.6b {kind}")
    assert {program["name"].partition("(")[2].partition(")")[0] for program in result["programs"]} == {
        "greedy",
        "sample",
        "logprobs",
        "edit",
    }
    assert all(program["collectives"] == {} for program in result["programs"])
