from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_driver import MODEL, Driver, make_config, make_request

from lamina_jax.config import ConfigError
from lamina_jax.engine.prefill import choose_bucket
from lamina_jax.engine.scheduler import Scheduler

SHARED = [("heads", 1), ("requests", 1), ("requests", 2), ("requests", 3), ("tokens", 2), ("tokens", 3)]


def buckets_for(partition, workers, rows):
    """A few row counts for at most `rows` requests, in equal segments by request."""
    segments = workers if partition == "requests" else 1
    most = -(-rows // segments)
    return tuple(segments * size for size in sorted({1, (most + 1) // 2, most}))


class AnyTraffic(RuleBasedStateMachine):
    """Requests come and go in any order, with the next step planned before or after tokens are read."""

    @initialize(
        microbatches=st.integers(1, 3),
        max_num_seqs=st.integers(1, 5),
        num_pages=st.integers(2, 12),
        page_size=st.sampled_from([1, 3, 4]),
        run_ahead=st.integers(0, 1),
        stall=st.sampled_from([0.5, 2.5, 9.0]),
        shared=st.sampled_from(SHARED),
    )
    def start(self, microbatches, max_num_seqs, num_pages, page_size, run_ahead, stall, shared):
        partition, workers = shared
        self.driver = Driver(
            make_config(
                microbatches=microbatches,
                max_num_seqs=max_num_seqs,
                num_pages=num_pages,
                page_size=page_size,
                max_model_len=12,
                decode_buckets=buckets_for(partition, workers, -(-max_num_seqs // microbatches)),
                prefill_buckets=((1, 5), (2, 3), (4, 1)),
                prefill_seconds=(3.0, 2.0, 1.0),
                prefill_stall=stall,
                partition=partition,
                workers=workers,
            ),
            run_ahead=run_ahead,
        )

    @rule(
        number=st.integers(0, 7),
        prompt=st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 8),
        stop=st.frozensets(st.integers(0, MODEL.vocab_size - 1), max_size=4),
    )
    def add(self, number, prompt, max_tokens, stop):
        request = make_request(f"r{number}", prompt, max_tokens, stop)
        total = min(len(prompt) + max_tokens, 12) - 1
        config = self.driver.config
        holders = config.workers if config.partition == "tokens" else 1
        too_large = -(-total // config.page_size) > config.num_pages * holders
        if request.request_id in self.driver.live or too_large:
            with pytest.raises(ValueError, match=r"already held|num_pages"):
                self.driver.scheduler.add(request)
        else:
            self.driver.add(request)

    @rule(number=st.integers(0, 7))
    def abort(self, number):
        self.driver.abort(f"r{number}")

    @rule()
    def drop_running(self):
        self.driver.drop_running()

    @rule(steps=st.integers(1, 5))
    def run(self, steps):
        for _ in range(steps):
            self.driver.run_step()

    @rule()
    def schedule(self):
        self.driver.schedule()

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def update(self):
        self.driver.update()

    @invariant()
    def counts(self):
        self.driver.check_counts()

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.finish()


TestAnyTraffic = AnyTraffic.TestCase
TestAnyTraffic.settings = settings(
    deadline=None, max_examples=120, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize(("run_ahead", "page_size"), [(1, 1), (0, 4)])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize(("partition", "workers"), SHARED)
def test_heavy_traffic(partition, workers, microbatches, run_ahead, page_size):
    """Full microbatches, whose rows change all the time; with pages of one token, requests are preempted."""
    random = np.random.default_rng([workers, microbatches, run_ahead])
    config = make_config(
        microbatches=microbatches,
        num_pages={1: 24, 4: 60}[page_size] // (workers if partition == "tokens" else 1),
        page_size=page_size,
        max_num_seqs=9,
        decode_buckets=buckets_for(partition, workers, -(-9 // microbatches)),
        partition=partition,
        workers=workers,
    )
    driver = Driver(config, run_ahead=run_ahead)
    for number in range(40):
        prompt = random.integers(MODEL.vocab_size, size=random.integers(1, 13)).tolist()
        stop = random.integers(MODEL.vocab_size, size=number % 2).tolist()
        driver.add(make_request(f"r{number}", prompt, int(random.integers(1, 12)), stop))
        if number > 12:
            driver.run_step()
            driver.check_counts()
        if number % 5 == 0:
            driver.schedule()
            driver.abort(str(random.choice(sorted(driver.live))))
    driver.finish()
    assert bool(driver.preemptions) == (page_size == 1)


def decode_plan(plan, microbatch=0):
    return next(m for m in plan.microbatches if m.kind == "decode" and m.microbatch == microbatch)


def test_a_request_from_prompt_to_end():
    driver = Driver(make_config(microbatches=1))
    driver.add(make_request("a", [5, 6, 7, 8, 9], max_tokens=3))
    prefill = driver.schedule().microbatches[0]
    first, second, third = driver.live["a"].alone
    pages = prefill.block_tables[0, :2]
    assert prefill.bucket == (2, 8)
    assert prefill.tokens[0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert prefill.positions[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert prefill.slots[0].tolist() == [*(pages[0] * 4 + np.arange(4)), pages[1] * 4, 96, 96, 96]
    assert prefill.logits_at.tolist() == [4, 0]

    assert driver.schedule() is None, "its first token must be read before it decodes"
    assert [event.token_id for event in driver.update()] == [first]
    decode = decode_plan(driver.schedule())
    assert (decode.tokens.tolist(), decode.feedback.tolist()) == ([[first]], [-1])
    assert (decode.positions.tolist(), decode.context_lens.tolist()) == ([[5]], [5])
    assert decode.slots.tolist() == [[pages[1] * 4 + 1]]

    ahead = decode_plan(driver.schedule())
    assert (ahead.tokens.tolist(), ahead.feedback.tolist()) == ([[0]], [0])
    assert ahead.slots.tolist() == [[pages[1] * 4 + 2]]
    assert [event.token_id for event in driver.update()] == [second]
    assert driver.schedule() is None, "no token is planned beyond max_tokens"
    (event,) = driver.update()
    assert (event.token_id, event.finish_reason) == (third, "length")
    driver.finish()


def test_without_run_ahead_tokens_come_from_the_host():
    driver = Driver(make_config(microbatches=1), run_ahead=0)
    driver.add(make_request("short", [4, 5], max_tokens=2))
    driver.add(make_request("long", [1, 2, 3], max_tokens=4))
    first, second = driver.live["short"].alone, driver.live["long"].alone
    driver.schedule()
    driver.update()
    for request_ids, tokens in [
        (("short", "long"), [[first[0]], [second[0]]]),
        (("long",), [[second[1]]]),
        (("long",), [[second[2]]]),
    ]:
        plan = decode_plan(driver.schedule())
        assert plan.request_ids == request_ids
        assert plan.tokens.tolist() == tokens
        assert (plan.feedback == -1).all()
        driver.update()
    driver.finish()


def test_never_more_than_two_steps_in_flight():
    driver = Driver(make_config(), run_ahead=2)
    driver.add(make_request("a", max_tokens=8))
    driver.schedule()
    driver.update()
    assert driver.schedule()
    assert driver.schedule()
    assert driver.schedule() is None
    driver.finish()


def test_rows_move_up_and_feedback_follows_them():
    driver = Driver(make_config(microbatches=1, num_pages=64))
    for name in "abcd":
        driver.add(make_request(name, max_tokens=9))
    driver.schedule()
    driver.update()
    driver.schedule()
    driver.abort("b")
    plan = decode_plan(driver.schedule())
    assert plan.request_ids == ("a", "c", "d")
    assert plan.feedback.tolist() == [0, 2, 3, -1]
    driver.finish()


def test_the_overrun_token_is_dropped_and_its_pages_wait():
    driver = Driver(make_config(microbatches=1))
    stop = MODEL.generate([1, 2, 3], 2)[1]
    driver.add(make_request("a", [1, 2, 3], max_tokens=8, stop=[stop]))
    driver.schedule()
    driver.update()
    driver.schedule()
    driver.schedule()
    (event,) = driver.update()
    assert (event.token_id, event.finish_reason) == (stop, "stop")
    assert driver.scheduler.pages.num_used == 2
    assert driver.scheduler.has_work
    assert driver.update() == []
    assert driver.scheduler.pages.num_used == 0
    driver.finish()


def test_an_aborted_request_waits_for_its_step_and_its_id_is_free_at_once():
    driver = Driver(make_config())
    driver.add(make_request("a"))
    driver.schedule()
    driver.abort("a")
    driver.abort("a")
    assert driver.scheduler.pages.num_used == 1
    driver.add(make_request("a", [9, 9]))
    assert driver.update() == []
    assert driver.scheduler.pages.num_used == 0
    driver.finish()


def test_requests_enter_the_emptiest_microbatch():
    driver = Driver(make_config(num_pages=64))
    for name in "abcd":
        driver.add(make_request(name))
    driver.schedule()
    driver.update()
    plan = driver.schedule()
    assert [m.request_ids for m in plan.microbatches] == [("a", "c"), ("b", "d")]
    driver.finish()


def test_rows_that_have_ended_do_not_count_for_the_emptiest():
    driver = Driver(make_config(num_pages=64))
    for name, max_tokens in (("a", 2), ("b", 9), ("c", 2)):
        driver.add(make_request(name, max_tokens=max_tokens))
    driver.schedule()
    driver.update()
    driver.add(make_request("d"))
    driver.schedule()
    assert {event.request_id for event in driver.update() if event.finish_reason} == {"a", "c"}
    assert [m.request_ids for m in driver.schedule().microbatches] == [("d",), ("b",)]
    driver.finish()


def test_prefill_joins_the_decode_microbatches():
    driver = Driver(make_config())
    driver.add(make_request("a", max_tokens=8))
    driver.schedule()
    driver.update()
    driver.add(make_request("b"))
    plan = driver.schedule()
    assert [(m.kind, m.microbatch, m.request_ids) for m in plan.microbatches] == [
        ("decode", 0, ("a",)),
        ("prefill", 2, ("b",)),
    ]
    driver.finish()


@pytest.mark.parametrize(
    ("lengths", "bucket", "served"),
    [
        ([3], (1, 12), 1),  # fewest tokens for one prompt
        ([4, 4, 4, 4, 4], (4, 4), 4),  # four share them
        ([3, 3], (4, 4), 2),  # as many tokens as (2, 8) in shorter rows
        ([8, 8, 2], (2, 8), 2),
        ([9, 1], (1, 12), 1),
        ([100, 100], (2, 8), 2),  # chunks of both
    ],
)
def test_the_prefill_bucket_brings_the_most_tokens_and_keeps_the_order(lengths, bucket, served):
    config = make_config(
        num_pages=999, max_model_len=200, max_num_seqs=8, prefill_buckets=((1, 12), (2, 8), (4, 4))
    )
    driver = Driver(config)
    for name, length in enumerate(lengths):
        driver.add(make_request(str(name), range(length)))
    plan = driver.schedule().microbatches[-1]
    assert (plan.bucket, len(plan.request_ids)) == (bucket, served)
    driver.finish()


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode():
    driver = Driver(make_config(max_model_len=60, num_pages=40), run_ahead=0)
    driver.add(make_request("short", max_tokens=9))
    driver.run_step()
    driver.add(make_request("long", range(40), max_tokens=2))
    chunks = []
    while len(chunks) < 3:
        decode, prefill = driver.schedule().microbatches
        assert decode.request_ids == ("short",)
        assert prefill.request_ids == ("long",)
        chunks.append((int(prefill.context_lens[0]), bool(prefill.samples[0])))
        driver.update()
    assert chunks == [(0, False), (16, False), (32, True)]
    driver.finish()


@pytest.mark.parametrize(
    ("stall", "decoding", "bucket"),
    [
        (9.0, True, (1, 16)),
        (2.5, True, (2, 8)),  # the best that takes no longer
        (0.1, True, (4, 4)),  # nothing is quick enough: the quickest
        (0.1, False, (1, 16)),  # nobody waits
    ],
)
def test_a_stall_bounds_the_bucket_while_requests_decode(stall, decoding, bucket):
    config = make_config(prefill_seconds=(4.0, 2.0, 1.5), prefill_stall=stall)
    assert choose_bucket(config, [99], decoding=decoding) == bucket


def test_a_short_request_does_not_overtake_a_large_one():
    driver = Driver(make_config(num_pages=6))
    driver.add(make_request("small", max_tokens=2))
    driver.add(make_request("large", range(20), max_tokens=4))
    driver.add(make_request("late", max_tokens=2))
    assert driver.schedule().microbatches[-1].request_ids == ("small",)
    assert driver.scheduler.num_waiting == 2
    driver.finish()


def test_seats_are_respected():
    driver = Driver(make_config(max_num_seqs=3, num_pages=64))
    for name in "abcde":
        driver.add(make_request(name))
    assert driver.schedule().microbatches[-1].request_ids == ("a", "b", "c")
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (3, 2)
    driver.finish()


def test_the_continuation_is_clipped_to_max_model_len():
    driver = Driver(make_config(max_model_len=6))
    driver.add(make_request("a", [1, 2, 3], max_tokens=100))
    driver.finish()
    assert len(driver.clients[0].tokens) == 3


@pytest.mark.parametrize(
    ("changes", "request_", "message"),
    [
        ({}, make_request("x", []), "the prompt is empty"),
        ({"max_model_len": 3}, make_request("x"), "3 tokens .* max_model_len=3"),
        ({}, make_request("x", range(24)), "24 tokens .* max_model_len=24"),
        ({"num_pages": 1}, make_request("x"), "3 prompt tokens and 4 new ones need 2 pages.* num_pages=1 "),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(changes, request_, message):
    scheduler = Scheduler(make_config(**changes))
    with pytest.raises(ValueError, match=message):
        scheduler.add(request_)
    assert not scheduler.has_work


def test_an_id_in_use_is_refused():
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("x"))
    with pytest.raises(ValueError, match="'x' is already held"):
        scheduler.add(make_request("x"))


def test_plans_are_updated_in_order_and_in_shape():
    driver = Driver(make_config())
    driver.add(make_request("a"))
    driver.schedule()
    driver.update()
    first, second = driver.schedule(), driver.schedule()
    with pytest.raises(ValueError, match=r"step 2 is not the oldest in flight \(\[1, 2\]\)"):
        driver.scheduler.update(second, [np.zeros(1, np.int32)])
    for tokens in ([], [np.zeros(2, np.int32)], [np.zeros(1, np.float32)]):
        with pytest.raises(ValueError, match="step 1 needs tokens of shapes"):
            driver.scheduler.update(first, tokens)
    driver.finish()
    with pytest.raises(ValueError, match="not the oldest"):
        driver.scheduler.update(first, [np.zeros(1, np.int32)])


def test_lost_pages_are_noticed():
    scheduler = Scheduler(make_config())
    scheduler.check_idle()
    scheduler.pages.allocate([0, 0])
    with pytest.raises(RuntimeError, match="idle but 2 of 24 pages"):
        scheduler.check_idle()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pages": 0}, "num_pages must be at least 1"),
        ({"page_size": 2**31}, "does not fit int32"),
        ({"decode_buckets": ()}, "decode_buckets must be"),
        ({"decode_buckets": (4, 2)}, "decode_buckets must be"),
        ({"decode_buckets": (1,)}, "no room for 2 rows"),
        ({"prefill_buckets": ()}, "prefill_buckets must be"),
        ({"prefill_buckets": ((1, 0),)}, "prefill_buckets must be"),
    ],
)
def test_a_limit_that_cannot_be_obeyed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_the_host_half_of_the_engine_loads_no_jax():
    code = (
        "import sys, lamina_jax.engine.scheduler, lamina_jax.engine.pipeline, lamina_jax.testing;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
