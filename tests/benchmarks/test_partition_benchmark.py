from __future__ import annotations

import argparse

import numpy as np
import pytest

from lamina_jax.benchmarks import partition
from lamina_jax.engine.scheduler import Scheduler


@pytest.fixture
def short(monkeypatch):
    """One trace of short requests."""
    monkeypatch.setattr(partition, "TRACES", {"Short": (300.0, 12.0)})
    monkeypatch.setattr(partition, "MAX_MODEL_LEN", 4096)


def arguments(*flags):
    parser = argparse.ArgumentParser()
    partition.add_arguments(parser)
    return parser.parse_args(flags)


def test_the_table_has_a_row_for_each_partition(short, capsys):
    results = partition.run(arguments("--workers", "1", "3", "--requests", "12"))
    balance = {(row["partition"], row["workers"]): row["balance"] for row in results}
    assert [balance[kind, 1] for kind in ("heads", "requests", "tokens")] == [1, 1, 1]
    assert balance["heads", 3] is None
    assert 1 < balance["tokens", 3] < balance["requests", 3] < 3
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split() for line in last] == [
        ["Short", "(300", "+", "12", "tokens),", "heads", "1.00", "-"],
        ["Short", "(300", "+", "12", "tokens),", "requests", "1.00", f"{balance['requests', 3]:.2f}"],
        ["Short", "(300", "+", "12", "tokens),", "tokens", "1.00", f"{balance['tokens', 3]:.2f}"],
    ]


def test_too_few_seats_are_refused():
    with pytest.raises(SystemExit, match="--seats 3 does not hold --requests 4"):
        partition.run(arguments("--requests", "4", "--seats", "3"))


def test_the_number_held_is_constant(short):
    scheduler = Scheduler(partition._config("tokens", 2, 6))
    ended = partition._serve(scheduler, partition._trace(300, 12), 6)
    for _ in range(50):
        next(ended)
        assert scheduler.num_running + scheduler.num_waiting == 6


def test_lengths_have_the_means_of_their_trace():
    random = np.random.default_rng(1)
    lengths = [partition._lognormal(random, 500) for _ in range(20000)]
    assert np.mean(lengths) == pytest.approx(500, rel=0.03)
    assert min(lengths) >= 1
