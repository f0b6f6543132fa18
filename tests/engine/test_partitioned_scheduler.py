"""Pages and rows dealt to several workers: who gets what, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_driver import Driver, make_config, make_request

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.core import SamplingParams
from lamina_jax.engine.admission import Room
from lamina_jax.engine.buckets import decode_buckets
from lamina_jax.engine.limits import resolve_limits
from lamina_jax.engine.scheduler import Scheduler


def by_request(workers=2, **changes):
    settings = {
        "partition": "requests",
        "workers": workers,
        "microbatches": 1,
        "decode_buckets": (workers, 4 * workers),
    }
    return make_config(**(settings | changes))


def by_token(workers=3, **changes):
    return make_config(**({"partition": "tokens", "workers": workers, "microbatches": 1} | changes))


def workers_of(driver, plan):
    """For each live row, the workers of its pages."""
    return {
        name: (plan.block_tables[row, : driver.held[name]] // driver.config.num_pages).tolist()
        for row, name in enumerate(plan.request_ids)
        if name
    }


def test_by_request_the_next_goes_where_most_pages_are_free():
    driver = Driver(by_request(prefill_buckets=((1, 16),)))
    driver.add(make_request("large", range(10), max_tokens=10))
    for name in "bcd":
        driver.add(make_request(name, range(5), max_tokens=3))
    seen = {}
    for _ in range(4):
        seen |= workers_of(driver, driver.schedule().microbatches[-1])
        driver.update()
    assert seen == {"large": [0] * 3, "b": [1] * 2, "c": [1] * 2, "d": [0] * 2}
    driver.finish()


def test_by_request_rows_are_segments_with_padding_between():
    driver = Driver(by_request(num_pages=64))
    for name in "abc":
        driver.add(make_request(name, max_tokens=6))
    assert driver.schedule().microbatches[-1].request_ids == ("a", "c"), "rows of one worker only"
    assert driver.scheduler.num_waiting == 0, "b was passed by, not overtaken"
    assert driver.schedule().microbatches[-1].request_ids == ("b",)
    driver.update()
    driver.update()
    plan = driver.schedule().microbatches[0]
    assert plan.request_ids == ("a", "c", "", "", "b")
    assert plan.samples.tolist() == [True, True, False, False, True, False, False, False]
    ahead = driver.schedule().microbatches[0]
    assert ahead.feedback.tolist() == [0, 1, -1, -1, 4, -1, -1, -1]
    driver.abort("c")
    driver.update()
    smaller = driver.schedule().microbatches[0]
    assert (smaller.request_ids, smaller.feedback.tolist()) == (("a", "b"), [0, 4])
    driver.finish()


def test_by_request_a_full_worker_makes_the_next_one_wait_not_the_queue_turn_over():
    driver = Driver(by_request(num_pages=6, max_num_seqs=4))
    for name in "ab":
        driver.add(make_request(name, range(10), max_tokens=6))
    driver.add(make_request("large", range(10), max_tokens=12))
    driver.add(make_request("small", max_tokens=2))
    driver.schedule()
    driver.schedule()
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (2, 2)
    driver.finish()


def test_by_request_each_worker_has_its_seats():
    driver = Driver(by_request(num_pages=64, max_num_seqs=4, prefill_buckets=((1, 16),)))
    driver.add(make_request("long", range(12), max_tokens=12))
    for name in "bcde":
        driver.add(make_request(name, max_tokens=6))
    seen = {}
    for _ in range(4):
        seen |= workers_of(driver, driver.schedule().microbatches[-1])
        driver.update()
    assert seen == {"long": [0] * 4, "b": [1], "c": [1], "d": [0]}
    driver.finish()


def test_requests_that_are_placed_together_share_what_there_is():
    by_request_room = Room(by_request(), pages=[9, 8], seats=[1, 9], growing=[0, 0])
    assert [by_request_room.place(3, grows=False) for _ in range(4)] == [0, 1, 1, None]
    by_token_room = Room(by_token(), pages=[2, 3, 2], seats=[9], growing=[0])
    assert [by_token_room.place(count, grows=False) for count in (4, 2, 2, 1)] == [1, 0, None, 2]


def test_a_page_stays_free_for_whoever_may_grow():
    by_request_room = Room(by_request(), pages=[4, 4], seats=[9, 9], growing=[3, 0])
    assert [by_request_room.place(1, grows=True) for _ in range(4)] == [0, 1, 1, None]
    by_token_room = Room(by_token(), pages=[2, 2, 2], seats=[9], growing=[1])
    assert [by_token_room.place(2, grows=grows) for grows in (False, True, False)] == [0, 2, None]


def test_by_request_padding_rows_are_greedy_rows_of_the_sampler():
    driver = Driver(by_request(num_pages=64))
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=2, repetition_penalty=2.0)
    for name in "abc":
        driver.add(replace(make_request(name, max_tokens=4), sampling=sampling))
    for act in (driver.schedule, driver.schedule, driver.update, driver.update):
        act()
    plan = driver.schedule().microbatches[0]
    assert plan.request_ids == ("a", "c", "", "", "b")
    assert plan.sampling.logprobs
    assert plan.sampling.temperature.tolist() == [0] * 8
    assert plan.sampling.top_p.tolist() == [1] * 8
    assert plan.sampling.edits.repetition.tolist() == [2, 2, 1, 1, 2, 1, 1, 1]
    assert (plan.sampling.edits.history[:, 0] == [1, 1, -1, -1, 1, -1, -1, -1]).all()


def test_by_token_pages_go_round_and_short_requests_begin_on_different_workers():
    driver = Driver(by_token(prefill_buckets=((4, 16),), num_pages=8))
    driver.add(make_request("long", range(14), max_tokens=7))
    for name in "abc":
        driver.add(make_request(name, [1], max_tokens=3))
    seen = workers_of(driver, driver.schedule().microbatches[-1])
    assert seen == {"long": [0, 1, 2, 0], "a": [1], "b": [2], "c": [0]}
    driver.finish()


def test_by_token_a_request_may_be_longer_than_a_worker_holds():
    driver = Driver(by_token(num_pages=2))
    driver.add(make_request("a", range(15), max_tokens=9))
    driver.finish()
    assert len(driver.clients[0].tokens) == 9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (by_request(num_pages=4), "need 5 pages, each worker has num_pages=4 "),
        (by_token(num_pages=1, workers=2), "need 5 pages, each of 2 workers has num_pages=1 "),
    ],
)
def test_what_never_fits_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(config).add(make_request("x", range(10), max_tokens=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2}, r"workers=2: by head .* give workers=1"),
        ({"partition": "tokens", "workers": 0}, "workers must be at least 1"),
        (
            {"partition": "requests", "workers": 3},
            r"decode_buckets=\(1, 2, 4\) must be multiples of workers=3",
        ),
        ({"partition": "requests", "workers": 2, "decode_buckets": (2,), "max_num_seqs": 5}, "no room for 4"),
        ({"partition": "tokens", "workers": 4, "page_size": 2**26}, "workers=4 .* does not fit int32"),
    ],
)
def test_a_partition_that_cannot_be_obeyed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_after_a_lost_worker_those_who_wait_are_served_in_their_order():
    driver = Driver(by_token(max_num_seqs=2))
    for name in "abcd":
        driver.add(make_request(name, max_tokens=8))
    for _ in range(3):
        driver.run_step()
    stale = driver.schedule()
    driver.drop_running()
    assert [client.finish_reason for client in driver.clients] == ["abort", "abort", None, None]
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (0, 2)
    with pytest.raises(ValueError, match=r"not the oldest in flight \(\[\]\)"):
        driver.scheduler.update(stale, [])
    assert driver.schedule().microbatches[-1].request_ids == ("c", "d")
    driver.finish()


def test_nothing_runs_and_nothing_is_dropped():
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a"))
    assert scheduler.drop_running() == []
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize(
    ("rows", "segments", "buckets"),
    [
        (8, 1, (4, 8)),
        (9, 1, (4, 8, 16)),
        (8, 2, (4, 8)),
        (7, 3, (6, 12)),
        (16, 5, (5, 10, 20)),
        (1, 8, (8,)),
    ],
)
def test_decode_buckets_are_equal_segments(rows, segments, buckets):
    assert decode_buckets(rows, segments) == buckets


@pytest.mark.parametrize(
    ("partition", "workers", "buckets"),
    [("heads", 1, (4, 8, 16)), ("requests", 3, (6, 12)), ("tokens", 3, (4, 8, 16))],
)
def test_limits_for_workers(partition, workers, buckets):
    config = EngineConfig(partition=partition, max_num_seqs=12, microbatches=1)
    limits = resolve_limits(config, 4096, share_silicon=False, workers=3)
    scheduling = limits.scheduler(num_pages=70, vocab_size=10)
    assert (scheduling.partition, scheduling.workers) == (partition, workers)
    assert scheduling.decode_buckets == buckets
    assert scheduling.padding_slot == workers * 70 * 64
