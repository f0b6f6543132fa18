"""bench hosts: what decoding alone adds, the table, and a run over real processes."""

from __future__ import annotations

import argparse

import pytest

from lamina_jax.benchmarks.hosts import decoding, expected_bytes, run, table


def test_what_a_longer_batch_adds_is_decoding_alone() -> None:
    warm = {"steps": 10, "bytes": 500.0}  # and whatever happened before
    once = {"steps": 10 + 2 + 64, "bytes": 500.0 + 70 + 64 * 3}
    twice = {"steps": once["steps"] + 2 + 128, "bytes": once["bytes"] + 70 + 128 * 3}
    assert decoding(warm, once, twice) == {"bytes": 3.0}


def test_the_table_has_all_bytes_and_the_busiest_host() -> None:
    one = {"bytes": 30.0, "messages": 4.0, "metadata": 7.0, "cpu_ms": 1.0}
    other = {"bytes": 10.0, "messages": 8.0, "metadata": 6.0, "cpu_ms": 2.0}
    text = table([{"hosts": 2, "workers": 3, "formula": 41, "per_host": [one, other]}])
    assert text.splitlines()[-1].split() == ["2", "x", "3", "40", "41", "30", "0.750", "8.0", "7", "2.0"]


def test_only_a_partition_by_token_sends_q_to_every_worker() -> None:
    assert expected_bytes(2, 4, "heads") == expected_bytes(1, 1, "requests") == expected_bytes(4, 1, "tokens")
    assert expected_bytes(1, 4, "tokens") > expected_bytes(1, 2, "tokens") > expected_bytes(1, 1, "tokens")


@pytest.mark.hosts
@pytest.mark.parametrize(("hosts", "workers", "partition"), [(1, 2, "tokens"), (2, 1, "heads")])
def test_hosts_send_what_the_formula_says(hosts: int, workers: int, partition: str) -> None:
    (result,) = run(argparse.Namespace(hosts=[hosts], workers=[workers], partition=partition))
    sizes = [host["bytes"] for host in result["per_host"]]
    assert sizes == pytest.approx([result["formula"] / hosts] * hosts, rel=1e-6)
