"""Both sides of a decode step compile for devices that are not there, and say what they need of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from lamina_jax.aot.cases import chosen
from lamina_jax.aot.devices import Topology
from lamina_jax.aot.worker import missing
from lamina_jax.benchmarks import aot

# One process compiles all cases of a platform, in the first test that asks for one of them.
pytestmark = [pytest.mark.aot, pytest.mark.timeout(1500)]

LOAD: dict[str, Any] = {"rows": 32, "context": 4096, "kv_dtype": "auto"}

COMPUTE = {
    "compute llama3-70b v5e:4x4": (4, 70.55e9 * 2 / 16),
    "compute llama3-70b h100:2x8": (2, 70.55e9 * 2 / 16),
    "compute qwen3-0.6b v6e:2x2": (1, 0.596e9 * 2 / 4),
}
"""(hosts, bytes of weights on each device)"""

MEMORY = [f"memory llama3-70b {name}" for name in ("v5e:2x2", "v6e:2x2", "h100:1", "h20:1", "l40s:2")]
SAMPLER = ["sampler llama3-70b v5e:4x4", "sampler llama3-70b h100:2x8"]
TOO_LARGE = ["compute llama3-70b v5e:2x4", "memory llama3-70b v5e:1x1"]


SPLIT = [f"{side} llama3-8b {name}" for side, name in (("memory", "v5e:2x4/2"), ("memory", "h100:2x1/2"))]
"""The memory sides of a slice, and of two hosts, whose other halves have the layers."""


def compiled(name: str) -> dict[str, Any]:
    platform = _platform(name)
    if lacking := missing(platform):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    return _compiled(platform)[name]


@cache
def _compiled(platform: str) -> dict[str, dict[str, Any]]:
    names = [
        name for name in (*COMPUTE, *MEMORY, *SAMPLER, *SPLIT, *TOO_LARGE) if _platform(name) == platform
    ]
    return {result["case"]: result for result in aot.compile_cases(chosen(names), LOAD)}


def _platform(name: str) -> str:
    return Topology(name.rsplit(maxsplit=1)[-1]).kind.platform


@pytest.mark.parametrize("name", COMPUTE)
def test_the_layers_are_six_programs_and_move_two_sums_per_layer(name: str) -> None:
    """Two stages of the first slice and of all like the second, the last slice, the tokens fed back."""
    result, (hosts, weights) = compiled(name), COMPUTE[name]
    names = [program["name"].partition(" (")[2].partition(")")[0] for program in result["programs"]]
    assert sorted(names) == ["32, 1", "last", "query", "query", "rest", "rest"]
    assert result["hosts"] == hosts
    # On 16 devices the 8 KV heads are there twice, and norms are everywhere.
    assert result["needs"]["weights"] == pytest.approx(weights, rel=0.05)
    assert result["layer"] == {"all-reduce": 2}
    assert aot.refusal(result) == ""


@pytest.mark.parametrize("name", MEMORY)
def test_attention_reads_pages_where_they_lie(name: str) -> None:
    result = compiled(name)
    planned = ["plan"] if _platform(name) == "cuda" else []
    assert sorted(program["name"].split()[0] for program in result["programs"]) == [
        "append",
        "attend",
        *planned,
    ]
    tokens, bytes_per_token = 32 * 4096, 80 * 2 * 8 * 128 * 2
    assert result["needs"]["pages"] == tokens * bytes_per_token // result["devices"]
    layer = result["needs"]["pages"] // 80
    for program in result["programs"]:
        assert program["collectives"] == {}
        assert program["temporaries"] < layer / 4, "the pages are copied"
        assert (program["kernels"]["spilled"] or 0) <= 16, "bytes of a thread"


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_does_not_fit_is_refused_before_it_is_compiled(name: str) -> None:
    result = compiled(name)
    assert result["programs"] == []
    assert aot.refusal(result).startswith("does not fit: needs")


@pytest.mark.parametrize("name", SAMPLER)
def test_the_sampler_compiles_and_moves_nothing(name: str) -> None:
    result = compiled(name)
    assert {program["name"].partition("(")[2].partition(")")[0] for program in result["programs"]} == {
        "greedy",
        "sample",
        "logprobs",
        "edit",
    }
    assert all(program["collectives"] == {} for program in result["programs"])


@pytest.mark.parametrize("name", SPLIT)
def test_half_of_a_slice_or_of_two_hosts_is_a_side(name: str) -> None:
    result = compiled(name)
    assert result["hosts"] == 1
    assert result["devices"] == (4 if "v5e" in name else 1)
    assert aot.refusal(result) == ""


@pytest.mark.parametrize("name", ["v5e:1x1/1", "v5e:2x4/3", "v5e:2x4/"])
def test_halves_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="is no topology"):
        Topology(name)
