"""`bench kernels`: what a pass reads and what is told of it; one kernel's failure is not the others'."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lamina_jax.benchmarks.device_bandwidth import bandwidth
from lamina_jax.benchmarks.kernel_columns import Columns, KernelColumn
from lamina_jax.benchmarks.kernel_goals import goals
from lamina_jax.benchmarks.kernel_passes import (
    DTYPES,
    MOST_CALLS,
    Cell,
    Shape,
    block_tables,
    make_pool,
    paged_step,
)
from lamina_jax.benchmarks.kernels import measure

SHAPE = Shape(kv_heads=2, head_dim=16, page_size=4)
CELL = Cell(batch=2, context=7, group=3)


def columns(*dtypes: str, memory: int = 2**20, cells: tuple[Cell, ...] = (CELL,)) -> Columns:
    return Columns(SHAPE, dtypes, jax.devices()[:1], cells, memory)


@pytest.mark.parametrize(("dtype", "devices"), [*((dtype, 1) for dtype in DTYPES), ("int8", 2)])
def test_a_pass_is_attention_over_the_pages_of_every_call(dtype: str, devices: int) -> None:
    """All pages are alike, so that every call sees the same keys and values, whatever its table."""
    pool = make_pool(SHAPE, dtype, 13, jax.devices()[:devices])
    one = pool.make_pass("cpu", CELL, paged_step(dtype, "cpu"))
    assert (one.calls, one.num_bytes) == (3, 2 * 7 * SHAPE.token_bytes(dtype))

    page = np.random.default_rng(0).standard_normal((2, 2, 4, 16))  # [2, K, p, H], as the pool draws it
    k, v = np.concatenate([page, page], axis=2)[:, :, :7]  # [K, S, H] each
    q = np.ones((2, 3, 16))
    for _ in range(2 * one.calls):
        scores = np.exp(np.einsum("kgh,ksh->kgs", q, k) * 16**-0.5)
        q = np.einsum("kgs,ksh->kgh", scores / scores.sum(-1, keepdims=True), v)
    got = np.asarray(one.run(2)).astype(np.float64)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(got, np.tile(q.reshape(6, 16), (2, 1, 1)), atol=tolerance)


def test_no_page_is_read_twice_in_a_pass() -> None:
    tables = block_tables(CELL, num_pages=1000, page_size=4)
    assert tables.shape == (250, 2, 2)
    assert len(np.unique(tables)) == tables.size
    assert tables.max() < 1000
    assert len(block_tables(Cell(1, 1, 1), num_pages=2 * MOST_CALLS, page_size=4)) == MOST_CALLS


def test_cells_whose_pages_do_not_fit_are_left_out() -> None:
    page = SHAPE.page_size * (SHAPE.token_bytes("float32") + SHAPE.token_bytes("int8"))
    cells = (Cell(1, 40, 1), Cell(1, 44, 1))
    found = columns("float32", "int8", memory=10 * page, cells=cells)
    assert found.cells == [cells[0]]
    assert found.num_pages == 10


def test_figures_of_a_cell() -> None:
    rows = measure(columns("float32", "bfloat16"), CELL, lambda: 1e6, rounds=3, seconds=0.001)
    rows = [row for row in rows if row["kernel"] == "cpu"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        seconds = 1e-6 * row["microseconds"]
        assert row["bytes_per_second"] * seconds == pytest.approx(14 * SHAPE.token_bytes(row["dtype"]))
        assert row["share"] == pytest.approx(row["bytes_per_second"] / 1e6)
        assert row["cell_bytes"] == 14 * SHAPE.token_bytes("bfloat16")
    assert rows[1]["of_bfloat16"] == 1


def test_one_kernels_failure_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cell: Cell) -> None:
        raise ImportError("not installed\nand more")

    found = columns("float32")
    monkeypatch.setattr(found, "others", lambda: [KernelColumn("theirs", "bfloat16", fail)])
    rows = measure(found, CELL, lambda: 1e6, rounds=1, seconds=0.001)
    assert "error" not in rows[0]
    assert rows[-1]["error"] == "ImportError: not installed"
    assert (rows[-1]["kernel"], rows[-1]["batch"]) == ("theirs", 2)


def test_goals_count_the_cells_that_meet_them() -> None:
    rows = [
        {"kernel": "gpu-planned", "dtype": "bfloat16", "fixed_microseconds": 16.0},
        {"kernel": "gpu-planned", "dtype": "bfloat16", "share": 0.95, "cell_bytes": 2 * 10**9},
        {"kernel": "gpu-planned", "dtype": "bfloat16", "share": 0.85, "cell_bytes": 10**9},
        {
            "kernel": "gpu-planned",
            "dtype": "bfloat16",
            "share": 0.10,
            "cell_bytes": 10**6,
        },  # too small to count
        {"kernel": "gpu-planned", "dtype": "int8", "error": "ValueError", "cell_bytes": 10**9},
    ]
    assert list(goals(rows)) == [
        "goal: gpu-planned bfloat16 at least 0.9 of what the device gives: 0.85 to 0.95, met in 1 of 2 cells",
        "goal: gpu-planned bfloat16 fixed cost of a call at most 15 us: 16.0 (missed)",
    ]


def test_memory_is_measured() -> None:
    assert 1e7 < bandwidth(jax.devices()[:2], 1 << 20)() < 1e13
