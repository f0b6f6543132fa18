"""Pages run out: who leaves, what is kept, and that everybody gets the tokens that they get alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scheduler_driver import MODEL, Driver, make_config, make_request

from lamina_jax.core import SamplingParams
from lamina_jax.engine.sampling_rows import uniform

LONG = 20


def crowded(run_ahead=1, **changes):
    """Three requests that grow to six pages each: two of the three fit for a while, then one."""
    config = make_config(**({"num_pages": 8, "microbatches": 1, "prefill_buckets": ((4, 8),)} | changes))
    driver = Driver(config, run_ahead=run_ahead)
    for number, name in enumerate("abc"):
        driver.add(make_request(name, [number, 2, 3], max_tokens=LONG))
    return driver


def steps(driver):
    """The prefill microbatches of the steps to come, None for a step without one."""
    while driver.scheduler.has_work:
        plan = driver.schedule()
        if plan is None:
            driver.update()
        else:
            yield plan.microbatches[-1] if plan.microbatches[-1].kind == "prefill" else None


def run_until_preempted(driver):
    """Steps of before may still be in flight."""
    while not driver.preemptions:
        if driver.schedule() is None and not driver.preemptions:
            driver.update()


def prefill_of(driver, name):
    """The next prefill microbatch that has this request."""
    return next(plan for plan in steps(driver) if plan and name in plan.request_ids)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_the_youngest_leaves_and_goes_on_where_it_was(run_ahead):
    driver = crowded(run_ahead)
    run_until_preempted(driver)
    assert driver.scheduler.waiting == ["c"]
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (2, 1)
    plan = prefill_of(driver, "c")
    client = driver.live["c"]
    assert client.tokens, "what it had generated is kept"
    assert plan.tokens[0].tolist()[: client.known] == [2, 2, 3, *client.tokens][:8]
    driver.finish()
    assert driver.scheduler.generation_tokens == 3 * LONG
    assert driver.scheduler.prompt_tokens == 3 * 3


def test_one_bubble_and_the_others_go_on():
    driver = crowded()
    run_until_preempted(driver)
    assert driver.schedule() is None, "its pages are not back yet"
    driver.update()
    assert driver.schedule().microbatches[0].request_ids == ("a", "b")
    driver.finish()


def test_who_arrives_later_does_not_take_the_place_of_who_was_preempted():
    driver = crowded()
    run_until_preempted(driver)
    driver.add(make_request("late", [1], max_tokens=1))
    assert driver.scheduler.waiting == ["c", "late"]
    driver.finish()


def test_a_request_in_the_middle_of_its_prompt_may_leave():
    driver = crowded(num_pages=13, prefill_buckets=((4, 3),))
    driver.schedule()
    driver.add(make_request("d", range(20), max_tokens=2))
    run_until_preempted(driver)
    assert driver.scheduler.waiting == ["d"]
    assert not driver.live["d"].tokens
    driver.finish()


def test_pages_on_their_way_back_are_waited_for():
    """An abort gives pages back while a step names them: nobody has to leave."""
    driver = Driver(make_config(num_pages=6, microbatches=1))
    for name in "ab":
        driver.add(make_request(name, max_tokens=LONG))
    next(plan for plan in driver_decodes(driver) if plan.context_lens[0] == 11)
    assert driver.scheduler.pages.num_free == 0
    driver.abort("b")
    assert driver.schedule() is None
    driver.update()
    assert driver.schedule().microbatches[0].context_lens[0] == 12
    assert driver.preemptions == 0
    driver.finish()


def driver_decodes(driver):
    while True:
        if driver.in_flight:
            driver.update()
        plan = driver.schedule()
        if plan.microbatches[0].kind == "decode":
            yield plan.microbatches[0]


def test_by_request_the_youngest_of_the_short_worker_leaves():
    changes = {"partition": "requests", "workers": 2, "decode_buckets": (2, 4), "max_num_seqs": 4}
    driver = Driver(make_config(num_pages=6, microbatches=1, prefill_buckets=((4, 8),), **changes))
    for name in "abcd":
        driver.add(make_request(name, max_tokens=LONG if name in "ac" else 3))
    driver.add(make_request("e", max_tokens=LONG))
    run_until_preempted(driver)
    (gone,) = driver.scheduler.waiting
    assert gone == "c", "e is younger, on the other worker"
    driver.finish()


def test_a_stop_token_of_a_step_in_flight_ends_who_was_preempted():
    """Its last token is read while it is in the queue."""
    for place in range(1, LONG):
        driver = crowded()
        driver.abort("c")
        stop = MODEL.generate([2, 2, 3], LONG)[place]
        driver.add(make_request("c", [2, 2, 3], max_tokens=LONG, stop=[stop]))
        while driver.scheduler.has_work and not driver.preemptions:
            driver.run_step()
        if driver.preemptions and "c" not in driver.scheduler.waiting:
            assert driver.clients[-1].finish_reason == "stop"
            driver.finish()
            return
        driver.finish()
    pytest.fail("no stop token came in the step in flight")


@pytest.mark.parametrize("later", [0, 1, 2])
def test_an_abort_of_who_was_preempted(later):
    driver = crowded()
    run_until_preempted(driver)
    for _ in range(later):
        if driver.in_flight:
            driver.update()
    driver.abort("c")
    assert driver.scheduler.num_waiting == 0
    driver.finish()


def test_after_a_loss_who_was_preempted_before_goes_on():
    driver = crowded()
    run_until_preempted(driver)
    driver.run_step()
    driver.run_step()
    assert driver.scheduler.waiting == ["c"]
    assert not driver.is_in_flight("c")
    driver.drop_running()
    assert driver.scheduler.waiting == ["c"]
    driver.finish()
    assert len(driver.clients[2].tokens) == LONG


def test_pages_of_the_first_step_after_a_loss_are_not_given_out_while_it_runs():
    driver = crowded()
    driver.run_step()
    driver.drop_running()
    driver.add(make_request("d"))
    driver.schedule()
    driver.abort("d")
    assert driver.scheduler.pages.num_used == 1
    driver.finish()


def test_the_random_number_and_the_history_are_those_of_the_next_token():
    driver = crowded(prefill_buckets=((4, 24),))
    driver.abort("c")
    sampling = SamplingParams(max_tokens=LONG, presence_penalty=1.0)
    driver.add(replace(make_request("c", [2, 2, 3]), sampling=sampling, seed=7))
    run_until_preempted(driver)
    plan = prefill_of(driver, "c")
    assert plan.samples[0]
    tokens = driver.live["c"].tokens
    assert plan.sampling.uniform[0] == np.float32(uniform(7, 0, len(tokens)))
    history = plan.sampling.edits.history[0]
    assert history[history >= 0].tolist() == [2, 2, 3, *(token + MODEL.vocab_size for token in tokens)]
    driver.finish()


def test_log_probabilities_of_a_prompt_are_asked_for_once():
    """In chunks of three, with preemptions in the middle of a prompt and after it."""
    prompt = list(range(10)) * 2
    asked, begun = [], 0
    driver = crowded(num_pages=13, prefill_buckets=((1, 3),))
    told = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1)
    driver.add(replace(make_request("told", prompt, max_tokens=4), sampling=told))
    for prefill in steps(driver):
        if prefill and prefill.request_ids == ("told",):
            first = int(prefill.context_lens[0])
            begun += first == 0
            targets = [] if prefill.prompt_targets is None else prefill.prompt_targets.tolist()
            asked += [(first + i + 1, token) for i, token in enumerate(targets) if token >= 0]
    assert asked == [(place, token) for place, token in enumerate(prompt) if place]
    assert begun > 1
    driver.finish()
