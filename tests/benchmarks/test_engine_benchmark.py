from __future__ import annotations

import argparse

import numpy as np
import pytest

from lamina_jax.benchmarks import engine
from lamina_jax.testing import QuickModel


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(engine, "BATCHES", (2, 40))
    monkeypatch.setattr(engine, "SCHEDULER", ("schedule() + update() alone", 40))


def arguments(*flags):
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(flags)


def test_the_table_has_a_row_for_each_setting(capsys):
    results = engine.run(arguments("--rounds", "1", "--tokens", "9"))
    assert [(row["setting"], row["batch"]) for row in results] == [
        *((name, batch) for name in engine.SETTINGS for batch in (2, 40)),
        ("schedule() + update() alone", 40),
    ]
    assert all(row["tokens_per_second"] > 0 for row in results)
    lines = capsys.readouterr().out.splitlines()
    assert "batch 2  batch 40" in " ".join(lines)
    assert lines[-1].startswith("schedule() + update() alone")


def test_a_figure_of_wrong_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(
        QuickModel, "generate", lambda self, prompts, count: np.zeros((len(prompts), count), np.int32)
    )
    with pytest.raises(SystemExit, match="not the model's"):
        engine.run(arguments("--rounds", "1", "--tokens", "3"))


def test_the_quick_model_can_be_computed_by_hand():
    model = QuickModel(np.array([5, 9, 4], np.int32))
    assert model.generate(np.array([[1, 2], [7, 7]]), 3).tolist() == [[5, 9, 5], [4, 5, 4]]
