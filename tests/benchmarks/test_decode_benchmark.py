"""What `bench decode` makes of times and sizes; the processes that take them are not started here."""

from __future__ import annotations

import argparse
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, save_random

from lamina_jax.benchmarks import columns, decode
from lamina_jax.benchmarks.cells import PROCESS_BYTES, Cell, fit, footprint
from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.decode import LLAMA_CPP, ONE, SPLIT, TRANSFORMERS, TWO


def test_a_footprint_counts_weights_and_pages(tmp_path):
    folder = save_random(tmp_path)
    weights = (folder / "model.safetensors").stat().st_size
    page = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 64
    cell = Cell(8, 128)
    assert footprint(folder, "float32")(cell) == PROCESS_BYTES + weights + cell.pages * 4 * page
    assert footprint(folder, "bfloat16")(cell) == PROCESS_BYTES + weights // 2 + cell.pages * 2 * page


def test_a_cell_has_room_for_the_new_tokens():
    assert Cell(8, 127).pages == 16
    assert Cell(8, 128).pages == 24


@given(st.integers(1, 10), st.integers(1, 4), st.integers(1, 1000))
def test_cells_are_sorted_by_what_fits(page, columns, budget):
    cells = [Cell(batch, context) for batch in (1, 8) for context in (64, 640)]

    def one(cell):
        return 10 + page * cell.pages

    found = fit(cells, one, columns, budget)
    assert sorted([*found.together, *found.alone, *found.refused]) == sorted(cells)
    assert all(columns * one(cell) <= budget for cell in found.together)
    assert all(one(cell) <= budget < columns * one(cell) for cell in found.alone)
    assert all(one(cell) > budget for cell in found.refused)


def timings(**speeds):
    names = {"one": ONE, "two": TWO, "split": SPLIT, "transformers": TRANSFORMERS}
    return {
        names[name]: [{"tokens_per_second": speed, "cpus": 2.0} for speed in speeds[name]] for name in speeds
    }


def test_ratios_are_of_the_same_round():
    rows = columns.rows_of(timings(one=[10, 20, 40], split=[20, 20, 20]))
    assert rows[1]["ratios"][ONE] == pytest.approx(1.0)  # the median of 2, 1 and 0.5
    assert rows[1]["spread"] == 0


def test_goals_are_met_or_missed():
    rows = columns.rows_of(timings(one=[18], two=[20], split=[17], transformers=[10]))
    said = list(decode.goals(Cell(8, 128), rows))
    assert said == [
        f"goal: {ONE} at least 1.8 of transformers: 1.80 (met)",
        f"goal: {SPLIT} at least 0.95 of {ONE}: 0.94 (missed)",
        f"goal: {SPLIT} at least 0.9 of {TWO}: 0.85 (missed)",
    ]
    assert not list(decode.goals(Cell(1, 128), rows))
    assert "of transformers" in decode.format_decode(rows).splitlines()[0]


def test_without_transformers_its_column_and_its_goal_are_left_out():
    rows = columns.rows_of(timings(one=[1], two=[1], split=[1]))
    assert "transformers" not in decode.format_decode(rows)
    assert not any("transformers" in goal for goal in decode.goals(Cell(8, 128), rows))


def parsed(*flags):
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    return parser.parse_args(flags)


def test_a_cell_that_does_not_fit_is_named_and_nothing_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "host_memory", lambda: 2**30)
    monkeypatch.setattr(columns, "Column", None)
    flags = ["--model", str(save_random(tmp_path)), "--batch", "8", "--context", "128", "--dtype", "float32"]
    (result,) = decode.run(parsed(*flags))
    assert result["needs_bytes"] > 2**30
    said = capsys.readouterr()
    assert "batch 8, context 128" in said.out
    assert "needs 1 GB, more than 60% of what is free: not run" in said.out


@pytest.mark.parametrize("instead", ["--choices", "--cpu-kernels"])
def test_flags_of_columns_that_are_left_out_are_refused(instead):
    with pytest.raises(SystemExit, match="give one or the other"):
        decode.run(parsed(instead, "--reference-python", "python"))


class FakeColumn(Column):
    """Answers at a speed of its own; collects who is alive at once."""

    alive: set[str]

    def __init__(self, name, command, cores=None, cache=None):
        self.name = name
        self.alive.add(name)
        self.most = len(self.alive)

    def line(self):
        return "ready"

    def ask(self, steps, *, batch, context):
        assert self.name in self.alive
        taken = {"tokens_per_second": 5.0, "seconds": steps * 1.0, "steps": steps, "cpus": float(self.most)}
        return taken | ({"cache": "some"} if self.name in (TRANSFORMERS, LLAMA_CPP) else {})

    def close(self):
        self.alive.remove(self.name)


@pytest.mark.parametrize(("memory", "at_once"), [(1e12, 5), (2e9, 1)])
def test_columns_are_alive_together_where_memory_holds_them(tmp_path, monkeypatch, memory, at_once):
    monkeypatch.setattr(decode, "host_memory", lambda: int(memory))
    monkeypatch.setattr(columns, "Column", FakeColumn)
    FakeColumn.alive = set()
    folder = str(save_random(tmp_path))
    flags = ["--model", folder, "--batch", "4", "--context", "64", "--dtype", "bfloat16", "--rounds", "2"]
    args = parsed(*flags, "--reference-python", "python")
    args.llama_batched_bench = "llama-batched-bench"
    results = decode.run(args)
    assert [row["column"] for row in results] == [ONE, TWO, SPLIT, TRANSFORMERS, LLAMA_CPP]
    assert max(row["cpus"] for row in results) == at_once
    assert not FakeColumn.alive


def test_a_column_that_fails_is_named():
    column = Column("broken", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"'broken' ended with exit code 3$"):
        column.line()
    column.close()


def test_a_column_that_says_nothing_is_killed(monkeypatch):
    monkeypatch.setattr(columns, "ANSWER_SECONDS", 0.1)
    column = Column("silent", [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(SystemExit, match=r"exit code -9, killed after 0 s"):
        column.line()
    column.close()
