from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.engine.pages import PageError, PagePool


def test_counts_add_up():
    pool = PagePool(5, 16)
    pages = pool.allocate([0] * 3)
    assert sorted(set(pages)) == sorted(pages)
    assert (pool.num_free, pool.num_used, pool.num_pages) == (2, 3, 5)
    pool.free(pages)
    assert (pool.num_free, pool.num_used) == (5, 0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, pages):
    assert PagePool(1, 16).pages_for(tokens) == pages


def test_more_than_free_is_refused_and_takes_nothing():
    pool = PagePool(3, 4)
    pool.allocate([0] * 2)
    with pytest.raises(PageError, match="2 pages asked for, 1 of 3 are free"):
        pool.allocate([0] * 2)
    assert pool.num_free == 1


@pytest.mark.parametrize("page", [-1, 1, 3])
def test_a_page_that_is_not_held_cannot_be_given_back(page):
    pool = PagePool(3, 4)
    assert pool.allocate([0]) == [0]
    with pytest.raises(PageError, match=f"page {page} is given back but not held"):
        pool.free([page])


def test_a_page_is_given_back_once():
    pool = PagePool(3, 4)
    pages = pool.allocate([0])
    pool.free(pages, after_step=7)
    with pytest.raises(PageError, match="not held"):
        pool.free(pages)


def test_a_page_waits_for_the_last_step_that_names_it():
    pool = PagePool(2, 4)
    first, second = pool.allocate([0] * 2)
    pool.free([second], after_step=4)
    pool.free([first], after_step=3)
    pool.complete(2)
    assert pool.num_free == 0
    pool.complete(3)
    assert pool.allocate([0]) == [first]
    pool.complete(4)
    assert pool.allocate([0]) == [second]


def test_a_page_of_a_completed_step_is_free_at_once():
    pool = PagePool(1, 4)
    pool.complete(5)
    pool.free(pool.allocate([0]), after_step=5)
    assert pool.num_free == 1


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 1), (1, 0)])
def test_an_empty_pool_is_refused(num_pages, page_size):
    with pytest.raises(ValueError, match=f"num_pages={num_pages} and page_size={page_size}"):
        PagePool(num_pages, page_size)


@settings(deadline=None, max_examples=60)
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["allocate", "free", "complete"]), st.integers(0, 4)), max_size=60
    )
)
def test_no_page_is_in_two_hands(actions):
    pool, holdings, leaving, step = PagePool(7, 4), [], [], 0
    for action, number in actions:
        if action == "allocate" and number <= pool.num_free:
            holdings.append(pool.allocate([0] * number))
        elif action == "free" and holdings:
            pages = holdings.pop(number % len(holdings))
            pool.free(pages, after_step=step + number)
            leaving.append((step + number, pages))
        elif action == "complete":
            pool.complete(step)
            leaving = [(after, pages) for after, pages in leaving if after > step]
            step += 1
        used = [page for pages in holdings + [pages for _, pages in leaving] for page in pages]
        assert len(used) == len(set(used)) == pool.num_used
        assert pool.num_free + pool.num_used == pool.num_pages
