"""What each worker is told of a step, against the definition written out page by page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.core import MicrobatchPlan
from lamina_jax.pool.partition import Partition

PAGE_SIZE, NUM_PAGES = 4, 20


def make_plan(pages: list[list[int]], contexts: list[int], width: int, table_width: int, worker=None):
    """Rows with these pages and cached tokens, and `width` new tokens each; padding where there are none."""
    rows = len(pages)
    tables = np.zeros((rows, table_width), np.int32)
    slots = np.full((rows, width), 10**6, np.int32)
    positions = np.zeros((rows, width), np.int32)
    for row, (held, context) in enumerate(zip(pages, contexts, strict=True)):
        tables[row, : len(held)] = held
        for i in range(width if held else 0):
            place, offset = divmod(context + i, PAGE_SIZE)
            positions[row, i], slots[row, i] = context + i, held[place] * PAGE_SIZE + offset
    zeros = np.zeros((rows, width), np.int32)
    return MicrobatchPlan(
        microbatch=0,
        kind="decode" if width == 1 else "prefill",
        request_ids=tuple(str(row) if held else "" for row, held in enumerate(pages)),
        tokens=zeros,
        feedback=zeros[:, 0],
        positions=positions,
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
        page_index=np.tile(np.arange(table_width, dtype=np.int32), (rows, 1)),
        slots=slots,
        logits_at=zeros[:, 0],
        cached=True,
        samples=np.array([bool(held) for held in pages]),
        worker=worker,
    )


def lengths(rows: int, width: int, table_width: int):
    """For each row its cached tokens, or None for padding."""
    longest = table_width * PAGE_SIZE - width
    return st.lists(st.none() | st.integers(0, longest), min_size=rows, max_size=rows)


def pages_of(context: int | None, width: int) -> int:
    return 0 if context is None else -(-(context + width) // PAGE_SIZE)


def told_pages(told, row: int) -> list[tuple[int, int]]:
    """(page, place) of what a worker reads of a row."""
    entries = zip(told.block_tables[row].tolist(), told.page_index[row].tolist(), strict=True)
    return [(page, place) for page, place in entries if place * PAGE_SIZE < told.context_lens[row]]


def check_dtypes(told) -> None:
    assert {np.asarray(array).dtype for array in told} == {np.dtype(np.int32)}
    assert (np.diff(told.page_index, axis=1) > 0).all()


@settings(deadline=None, max_examples=80)
@given(data=st.data(), workers=st.integers(1, 4), width=st.integers(1, 3), table_width=st.integers(2, 7))
def test_by_token_every_page_and_slot_is_told_to_its_owner_alone(data, workers, width, table_width):
    contexts = data.draw(lengths(3, width, table_width))
    starts = data.draw(st.lists(st.integers(0, workers - 1), min_size=3, max_size=3))
    local = data.draw(st.permutations(range(NUM_PAGES)))
    pages = [
        [(start + m) % workers * NUM_PAGES + local[m] for m in range(pages_of(context, width))]
        for start, context in zip(starts, contexts, strict=True)
    ]
    plan = make_plan(pages, [context or 0 for context in contexts], width, table_width)
    partition = Partition("tokens", workers, NUM_PAGES, PAGE_SIZE)
    answers = partition.split(plan)
    assert [answer[:2] for answer in answers] == [(worker, 0) for worker in range(workers)]
    for worker, _, told in answers:
        check_dtypes(told)
        assert told.block_tables.shape == (3, partition.table_width(table_width))
        kept = []
        for row, held in enumerate(pages):
            mine = [(page % NUM_PAGES, m) for m, page in enumerate(held) if page // NUM_PAGES == worker]
            assert told_pages(told, row) == [
                (page, m) for page, m in mine if m * PAGE_SIZE < plan.context_lens[row]
            ]
            for i in range(width):
                owner, slot = divmod(int(plan.slots[row, i]), partition.padding_slot)
                assert told.slots[row, i] == (slot if owner == worker else partition.padding_slot)
                kept += [row * width + i] if owner == worker else []
        assert partition.kept(told.slots).tolist() == kept
        assert told.context_lens is plan.context_lens


@settings(deadline=None, max_examples=60)
@given(data=st.data(), workers=st.integers(1, 4), rows=st.integers(1, 3), table_width=st.integers(2, 6))
def test_by_request_each_worker_is_told_of_its_segment(data, workers, rows, table_width):
    contexts = data.draw(lengths(workers * rows, 1, table_width))
    local = data.draw(st.permutations(range(NUM_PAGES)))
    pages = [
        [row // rows * NUM_PAGES + page for page in local[: pages_of(context, 1)]]
        for row, context in enumerate(contexts)
    ]
    plan = make_plan(pages, [context or 0 for context in contexts], 1, table_width)
    partition = Partition("requests", workers, NUM_PAGES, PAGE_SIZE)
    assert partition.table_width(table_width) == table_width
    answers = partition.split(plan)
    assert [answer[:2] for answer in answers] == [(worker, worker) for worker in range(workers)]
    for worker, _, told in answers:
        check_dtypes(told)
        assert len(told.slots) == rows
        for row, global_row in enumerate(range(worker * rows, (worker + 1) * rows)):
            held, context = pages[global_row], int(plan.context_lens[global_row])
            assert told.context_lens[row] == context
            assert told.positions[row] == plan.positions[global_row]
            read = [(page % NUM_PAGES, m) for m, page in enumerate(held)]
            assert told_pages(told, row) == [(page, m) for page, m in read if m * PAGE_SIZE < context]
            expected = plan.slots[global_row] % partition.padding_slot if held else partition.padding_slot
            assert told.slots[row] == expected


@pytest.mark.parametrize("worker", [0, 2])
def test_by_request_a_prompt_is_told_to_its_worker_alone(worker):
    first = worker * NUM_PAGES
    plan = make_plan([[first + 3, first + 1], []], [2, 0], 3, 4, worker=worker)
    partition = Partition("requests", 3, NUM_PAGES, PAGE_SIZE)
    ((taker, segment, told),) = partition.split(plan)
    assert (taker, segment) == (worker, 0)
    assert told.block_tables.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]]
    assert told.slots.tolist() == [[14, 15, 4], [80, 80, 80]]
    assert partition.kept(told.slots).tolist() == [0, 1, 2]


def test_by_head_all_workers_are_told_the_same():
    plan = make_plan([[5, 2]], [6], 1, 3)
    ((worker, segment, told),) = Partition("heads", 1, NUM_PAGES, PAGE_SIZE).split(plan)
    assert (worker, segment) == (0, 0)
    assert told.block_tables is plan.block_tables
    assert told.slots is plan.slots
