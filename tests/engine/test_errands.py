"""Prompts prefilled elsewhere: whatever is aborted, lost or fails, tokens are right and pages come back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_driver import MODEL, make_config, make_request

from lamina_jax.core import Request, SamplingParams
from lamina_jax.engine.pages import PageError, PagePool
from lamina_jax.engine.scheduler import Errand, Scheduler
from lamina_jax.testing import FakeRunner

SHARED = [("heads", 1), ("requests", 2), ("tokens", 3)]
LONGEST = 12


@dataclass
class Running:
    """An errand on its way."""

    errand: Errand
    owner: int
    written: int = 0


class Elsewhere:
    """A scheduler, a runner, and errands that write token by token until they are over, dropped or not."""

    def __init__(self, config):
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner(
            MODEL,
            num_pages=config.num_pages,
            page_size=config.page_size,
            partition=config.partition,
            workers=config.workers,
        )
        self.alone: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.running: dict[int, Running] = {}
        self.dropped: set[int] = set()
        self.in_flight = deque()

    def add(self, request):
        self.scheduler.add(request)
        room = LONGEST - len(request.prompt_token_ids)
        wanted = min(request.sampling.max_tokens, room)
        self.alone[request.request_id] = MODEL.generate(request.prompt_token_ids, wanted)
        self.tokens[request.request_id] = []

    def end(self, request_ids):
        for request_id in request_ids:
            self.alone.pop(request_id, None)

    def abort(self, request_id):
        self.scheduler.abort(request_id)
        self.end([request_id])

    def lose_worker(self):
        """The cache is lost: nothing that is still on its way can write to the new one."""
        self.end(self.scheduler.drop_running())
        self.in_flight.clear()
        self.take_news()
        assert self.dropped == set(self.running)
        for number in list(self.running):
            self.over(number, complete=False)
        assert self.scheduler.pages.num_used == 0

    def take_news(self):
        begun, dropped = self.scheduler.errands()
        for errand in begun:
            assert errand.tokens
            self.running[errand.number] = Running(errand, self.runner.new_owner())
        assert set(dropped) <= set(self.running)
        self.dropped.update(dropped)

    def write(self, number, count=1):
        running = self.running[number]
        for position in range(running.written, min(running.written + count, len(running.errand.tokens))):
            token = running.errand.tokens[position]
            self.runner.bring(running.owner, running.errand.pages, position, token)
            running.written = position + 1

    def over(self, number, *, complete):
        if complete:
            self.write(number, LONGEST)
        running = self.running.pop(number)
        if number in self.dropped:
            self.dropped.discard(number)
        elif complete:
            self.runner.own(running.errand.request_id, running.owner)
        self.scheduler.arrived(number, complete=complete)

    def schedule(self):
        plan = self.scheduler.schedule()
        self.take_news()
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def update(self):
        plan = self.in_flight.popleft()
        for event in self.scheduler.update(plan, self.runner.dispatch(plan)):
            self.tokens[event.request_id].append(event.token_id)
            if event.finish_reason:
                expected = self.alone.pop(event.request_id)
                assert self.tokens[event.request_id] == expected

    def finish(self):
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            planned = self.schedule()
            if self.in_flight:
                self.update()
            elif self.running:
                self.over(min(self.running), complete=True)
            else:
                assert planned, "nothing is on its way, and nothing is planned"
        assert not self.scheduler.has_work
        assert not self.alone
        for number in list(self.running):
            self.over(number, complete=False)
        self.scheduler.check_idle()


class AnyErrands(RuleBasedStateMachine):
    @initialize(
        microbatches=st.integers(1, 2),
        max_num_seqs=st.integers(1, 4),
        num_pages=st.integers(4, 12),
        page_size=st.sampled_from([1, 3]),
        shared=st.sampled_from(SHARED),
    )
    def start(self, microbatches, max_num_seqs, num_pages, page_size, shared):
        partition, workers = shared
        segments = workers if partition == "requests" else 1
        rows = segments * -(-max_num_seqs // segments)
        self.it = Elsewhere(
            make_config(
                microbatches=microbatches,
                max_num_seqs=max_num_seqs,
                num_pages=max(num_pages, -(-LONGEST // page_size)),
                page_size=page_size,
                max_model_len=LONGEST,
                decode_buckets=(rows,),
                prefill_buckets=((1, 5), (2, 3)),
                partition=partition,
                workers=workers,
            )
        )

    @rule(
        number=st.integers(0, 7),
        prompt=st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 8),
    )
    def add(self, number, prompt, max_tokens):
        if f"r{number}" not in self.it.alone:
            self.it.add(make_request(f"r{number}", prompt, max_tokens))

    @rule(number=st.integers(0, 7))
    def abort(self, number):
        self.it.abort(f"r{number}")

    @rule(there=st.booleans())
    def hosts(self, there):
        self.it.scheduler.elsewhere = there

    @rule()
    def lose_worker(self):
        self.it.lose_worker()

    @rule()
    def schedule(self):
        self.it.schedule()

    @precondition(lambda self: self.it.in_flight)
    @rule()
    def update(self):
        self.it.update()

    @precondition(lambda self: self.it.running)
    @rule(data=st.data(), complete=st.booleans())
    def over(self, data, complete):
        self.it.over(data.draw(st.sampled_from(sorted(self.it.running))), complete=complete)

    @precondition(lambda self: self.it.running)
    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data, count):
        self.it.write(data.draw(st.sampled_from(sorted(self.it.running))), count)

    @invariant()
    def pages(self):
        if hasattr(self, "it"):
            pages = self.it.scheduler.pages
            assert pages.num_free + pages.num_used == pages.num_pages

    def teardown(self):
        if hasattr(self, "it"):
            self.it.finish()


TestAnyErrands = AnyErrands.TestCase
TestAnyErrands.settings = settings(
    deadline=None, max_examples=50, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)


def driven(**changes):
    it = Elsewhere(make_config(max_model_len=LONGEST, **changes))
    it.scheduler.elsewhere = True
    return it


def test_what_is_brought_is_all_but_the_last_token():
    it = driven()
    it.add(make_request("a", (1, 2, 3, 4, 5)))
    assert it.schedule() is None
    (running,) = it.running.values()
    assert running.errand.tokens == (1, 2, 3, 4)
    assert it.scheduler.num_running == 1
    assert it.scheduler.num_waiting == 0
    it.over(running.errand.number, complete=True)
    plan = it.schedule()
    (decode,) = plan.microbatches
    assert decode.kind == "decode"
    assert (decode.tokens[0, 0], decode.context_lens[0]) == (5, 4)
    it.finish()


@pytest.mark.parametrize("sampling", [{}, {"prompt_logprobs": 1}])
def test_what_must_be_prefilled_here_is(sampling):
    it = driven()
    prompt = (1, 2, 3) if sampling else (1,)
    params = SamplingParams(max_tokens=3, temperature=0, **sampling)
    it.scheduler.add(Request(request_id="a", prompt_token_ids=prompt, sampling=params))
    assert it.schedule().microbatches[-1].kind == "prefill"
    assert not it.running


def test_a_penalised_request_does_not_count_the_last_prompt_token_as_generated():
    """A decode row's input is taken for a generated token."""
    it = driven()
    params = SamplingParams(max_tokens=3, temperature=0, presence_penalty=1.0)
    it.scheduler.add(Request(request_id="a", prompt_token_ids=(1, 2, 3), sampling=params))
    it.schedule()
    it.over(0, complete=True)
    (batch,) = it.schedule().microbatches
    assert batch.kind == "prefill"
    assert batch.context_lens[0] == 2
    assert batch.sampling.edits.history[0, :3].tolist() == [1, 2, 3]


def test_a_preempted_request_is_brought_anew_with_what_it_had_generated():
    """The oldest grows until the others must go."""
    it = driven(num_pages=4, page_size=3, max_num_seqs=2, decode_buckets=(1, 2))
    it.add(make_request("a", (1, 2, 3, 4), max_tokens=8))
    it.add(make_request("b", (5, 6), max_tokens=5))
    seen = []
    while it.scheduler.has_work:
        it.schedule()
        for number in list(it.running):
            seen.append(it.running[number].errand)
            it.over(number, complete=True)
        if it.in_flight:
            it.update()
    again = [errand for errand in seen if errand.request_id == "b"]
    assert it.scheduler.preemptions == 1
    assert len(again) == 2
    assert again[1].tokens == (5, 6, *it.tokens["b"])[: len(again[1].tokens)]
    assert len(again[1].tokens) > len(again[0].tokens)


def test_pages_wait_for_the_errand():
    pool = PagePool(4, 2)
    pages = pool.allocate([0, 0, 0])
    pool.free(pages[:2], after_errand=7)
    pool.complete(100)
    assert (pool.num_free, pool.leaving_by_worker, pool.errands) == (1, [2], [7])
    with pytest.raises(PageError, match="not held"):
        pool.free(pages[:1])
    pool.errand_over(7)
    pool.errand_over(7)
    assert (pool.num_free, pool.errands) == (3, [])


def test_many_requests_while_hosts_come_and_go():
    rng = np.random.default_rng(3)
    it = driven(num_pages=10, page_size=2, partition="requests", workers=2, decode_buckets=(2, 4))
    for i in range(40):
        it.add(
            make_request(f"r{i}", rng.integers(0, 11, rng.integers(1, 9)).tolist(), int(rng.integers(1, 4)))
        )
    for _ in range(2000):
        it.scheduler.elsewhere = bool(rng.integers(0, 2))
        it.schedule()
        for number in [n for n in it.running if rng.integers(0, 2)]:
            it.over(number, complete=bool(rng.integers(0, 4)))
        if it.in_flight:
            it.update()
    it.finish()
