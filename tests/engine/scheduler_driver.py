"""A scheduler driven over a fake runner, with everything checked that must hold at every moment."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from lamina_jax.core import Request, SamplingParams, StepPlan
from lamina_jax.engine.scheduler import Scheduler, SchedulerConfig
from lamina_jax.testing import FakeModel, FakeRunner

MODEL = FakeModel(vocab_size=11)


def make_config(**changes):
    settings = {
        "vocab_size": MODEL.vocab_size,
        "num_pages": 24,
        "page_size": 4,
        "max_model_len": 24,
        "max_num_seqs": 4,
        "microbatches": 2,
        "decode_buckets": (1, 2, 4),
        "prefill_buckets": ((1, 16), (2, 8), (4, 4)),
    }
    return SchedulerConfig(**(settings | changes))


def make_request(request_id, prompt=(1, 2, 3), max_tokens=4, stop=()):
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
        stop_token_ids=frozenset(stop),
    )


@dataclass
class Client:
    """One request as its client sees it."""

    request: Request
    arrival: int
    alone: list[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def known(self):
        """Tokens that whoever is admitted prefills."""
        return len(self.request.prompt_token_ids) + len(self.tokens)


class Driver:
    """A scheduler and a fake runner, with everything checked that must hold at every moment.

    A step is executed as late as it can be, just before its tokens are read: what happens to the
    scheduler in between must not reach into plans in flight.
    """

    def __init__(self, config, *, run_ahead=1):
        self.config = config
        self.run_ahead = run_ahead
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner(
            MODEL,
            num_pages=config.num_pages,
            page_size=config.page_size,
            partition=config.partition,
            workers=config.workers,
        )
        self.clients: list[Client] = []
        self.live: dict[str, Client] = {}
        self.queue: list[str] = []
        self.passed_by: list[str] = []
        self.worker_of: dict[str, int] = {}
        self.prefilled: dict[str, int] = {}
        self.held: dict[str, int] = {}  # pages
        self.admissions: Counter[str] = Counter()
        self.preemptions = 0
        self.in_flight: deque[tuple[StepPlan, dict[int, tuple[Client, int]]]] = deque()

    def add(self, request):
        self.scheduler.add(request)
        length = len(request.prompt_token_ids)
        limit = min(request.sampling.max_tokens, self.config.max_model_len - length)
        alone = MODEL.generate(request.prompt_token_ids, limit, request.stop_token_ids)
        self.live[request.request_id] = Client(request, len(self.clients), alone)
        self.forget(request.request_id)
        self.clients.append(self.live[request.request_id])
        self.queue.append(request.request_id)

    def abort(self, request_id):
        self.scheduler.abort(request_id)
        if request_id in self.live:
            self.live.pop(request_id).finish_reason = "abort"
        for waiting in (self.queue, self.passed_by):
            if request_id in waiting:
                waiting.remove(request_id)

    def forget(self, request_id):
        """What this request had in the cache."""
        for known in (self.prefilled, self.worker_of, self.held):
            known.pop(request_id, None)

    def drop_running(self):
        """A worker is lost: all that it may have held ends, with the steps in flight."""
        ended = [name for name in self.live if name not in self.queue or self.is_in_flight(name)]
        assert self.scheduler.drop_running() == ended
        for request_id in ended:
            self.live.pop(request_id).finish_reason = "abort"
        self.queue = [request_id for request_id in self.queue if request_id in self.live]
        self.passed_by.clear()
        self.in_flight.clear()
        assert self.scheduler.pages.num_free == self.config.total_pages

    def schedule(self):
        if len(self.in_flight) > self.run_ahead:
            return None
        plan = self.scheduler.schedule()
        self.note_preemptions(plan)
        if plan is not None:
            assert plan.microbatches
            for microbatch in plan.microbatches:
                self.check_microbatch(microbatch)
            self.check_pages(plan)
            self.in_flight.append((plan, self.pages_named(plan)))
        self.check_head_of_queue(plan)
        return plan

    def update(self):
        plan, _ = self.in_flight.popleft()
        events = self.scheduler.update(
            plan, [result.tokens for result in self.runner.read(self.runner.dispatch(plan))]
        )
        named = [request_id for microbatch in plan.microbatches for request_id in ids_of(microbatch)]
        assert {event.request_id for event in events} <= set(named)
        for event in events:
            client = self.live[event.request_id]
            if event.token_id is not None:
                client.tokens.append(event.token_id)
            client.finish_reason = event.finish_reason
            if event.finish_reason:
                del self.live[event.request_id]
                if event.request_id in self.queue:  # preempted in the step that brings its last token
                    self.queue.remove(event.request_id)
        return events

    def run_step(self):
        """What an engine does: plan as far ahead as it may, then read the oldest step."""
        while self.schedule() is not None:
            pass
        if self.in_flight:
            self.update()
        else:
            assert not self.scheduler.has_work, "work is left, nothing is in flight and nothing is planned"

    def finish(self):
        """Run to the end, and look at the whole story.

        The oldest request gets a chunk or a token in every other step at least, so there is a bound to the
        steps, however often others are preempted.
        """
        budget = 2 + 2 * sum(
            len(client.alone) + 2 + len(client.request.prompt_token_ids) for client in self.live.values()
        )
        while self.scheduler.has_work:
            self.run_step()
            budget -= 1
            assert budget >= 0, "the oldest request does not advance"
        assert self.scheduler.schedule() is None
        for client in self.clients:
            if client.finish_reason == "abort":
                assert client.tokens == client.alone[: len(client.tokens)]
            else:
                assert client.tokens == client.alone
                stopped = client.alone[-1] in client.request.stop_token_ids
                assert client.finish_reason == ("stop" if stopped else "length")
        self.scheduler.check_idle()
        assert self.scheduler.pages.num_free == self.config.total_pages

    def pages_for(self, tokens):
        return -(-tokens // self.config.page_size)

    def most_cached(self, request_id):
        request = self.live[request_id].request
        longest = len(request.prompt_token_ids) + request.sampling.max_tokens
        return min(longest, self.config.max_model_len) - 1

    def first_pages(self, request_id):
        """Of a request that is admitted now: for its tokens and the next one."""
        return self.pages_for(min(self.live[request_id].known + 1, self.most_cached(request_id)))

    def growing(self, worker):
        """Requests beside which one of `worker` would be, and which may need more pages."""
        return [
            name
            for name in self.live
            if name not in self.queue
            and (self.config.segments == 1 or self.worker_of.get(name, worker) == worker)
            and self.held.get(name, 0) < self.pages_for(self.most_cached(name))
        ]

    def note_preemptions(self, plan):
        """Who runs no more, or from the beginning: the youngest, and back in the order of the queue."""
        new = [] if plan is None or plan.microbatches[-1].kind == "decode" else self.beginning(plan)
        waiting = self.scheduler.waiting
        preempted = [
            name
            for name in self.live
            if name not in self.queue and (name in waiting or (name in new and name in self.held))
        ]
        self.preemptions += len(preempted)
        assert self.scheduler.preemptions == self.preemptions
        for name in preempted:
            for other, client in self.live.items():
                beside = self.config.segments == 1 or self.worker_of.get(other) == self.worker_of.get(name)
                if other not in self.queue and other not in preempted and beside:
                    assert client.arrival < self.live[name].arrival, f"{name} left before {other}"
        for name in preempted:
            self.forget(name)
        self.passed_by = [name for name in self.passed_by if name not in preempted]
        self.queue = sorted(self.queue + preempted, key=lambda name: self.live[name].arrival)

    def beginning(self, plan):
        """The requests whose first chunk is in a plan."""
        prefill = plan.microbatches[-1]
        return [name for row, name in enumerate(prefill.request_ids) if not prefill.context_lens[row]]

    def pages_named(self, plan):
        """Who has each page, in which of its lives."""
        return {
            int(page): (self.live[name], self.admissions[name])
            for microbatch in plan.microbatches
            for row, name in enumerate(microbatch.request_ids)
            if name
            for page in microbatch.block_tables[row, : self.held[name]]
        }

    def is_in_flight(self, request_id):
        named = [client for _, pages in self.in_flight for client, _ in pages.values()]
        return any(client is self.live[request_id] for client in named)

    def check_pages(self, plan):
        """No page in two hands: in this plan, nor between it and the steps in flight."""
        request_ids = [request_id for m in plan.microbatches for request_id in ids_of(m)]
        pages = self.pages_named(plan)
        assert len(set(request_ids)) == len(request_ids)
        assert len(pages) == sum(self.held[name] for name in request_ids)
        for _, named in self.in_flight:
            for page, life in pages.items():
                assert named.get(page, life) == life, f"page {page} is reused while a step names it"

    def check_microbatch(self, plan):
        """Shapes are those of a bucket, and everything beyond the live rows and tokens is padding."""
        (rows, width), limits = plan.bucket, self.config
        live = np.array([bool(name) for name in plan.request_ids] + [False] * (rows - len(plan.request_ids)))
        assert plan.request_ids[-1], "request_ids end with padding"
        arrays = {name: array for name, array in vars(plan).items() if isinstance(array, np.ndarray)}
        assert arrays.pop("samples").dtype == bool
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.int32)}
        assert plan.block_tables.shape == plan.page_index.shape == (rows, limits.table_width)
        assert (plan.page_index == np.arange(limits.table_width)).all()
        assert plan.positions.shape == plan.slots.shape == (rows, width)
        assert plan.feedback.shape == plan.context_lens.shape == plan.logits_at.shape == (rows,)
        for array in (plan.tokens, plan.positions, plan.context_lens, plan.block_tables):
            assert not array[~live].any()
        assert (plan.slots[~live] == limits.padding_slot).all()
        assert (plan.feedback[~live] == -1).all()
        if plan.kind == "decode":
            for row, request_id in enumerate(plan.request_ids):
                if request_id:
                    grown = self.pages_for(int(plan.context_lens[row]) + 1)
                    self.held[request_id] = max(self.held[request_id], grown)
            self.check_workers(plan)
            fullest = live.reshape(limits.segments, -1).sum(axis=1).max()
            assert fullest * limits.segments <= limits.rows_per_microbatch
            fitting = [bucket for bucket in limits.decode_buckets if bucket >= fullest * limits.segments]
            assert rows == fitting[0]
            assert (plan.samples == live).all()
            assert plan.microbatch < limits.microbatches
            assert (plan.positions[:, 0] == plan.context_lens).all()
            assert not plan.tokens[:, 0][plan.feedback >= 0].any()
            assert (plan.logits_at == np.arange(rows)).all()
            assert (plan.context_lens[live] > 0).all()
        else:
            assert plan.microbatch == limits.microbatches
            assert (rows, width) in limits.prefill_buckets
            assert (plan.feedback == -1).all()
            assert plan.cached == plan.context_lens.any()
            assert live[: len(plan.request_ids)].all()
            assert not plan.logits_at[~live].any()
            assert not plan.samples[~live].any()
            for row, request_id in enumerate(plan.request_ids):
                known, start = self.live[request_id].known, self.prefilled.get(request_id, 0)
                if not start:
                    assert not self.is_in_flight(request_id), "its tokens are not known yet"
                    self.held[request_id] = self.first_pages(request_id)
                    self.admissions[request_id] += 1
                assert plan.context_lens[row] == start, "a chunk does not follow the one before"
                length = min(width, known - start)
                assert length > 0
                assert (plan.slots[row, length:] == limits.padding_slot).all()
                assert (plan.slots[row, :length] < limits.padding_slot).all()
                assert (plan.positions[row, :length] == np.arange(start, start + length)).all()
                assert plan.samples[row] == (start + length == known)
                self.prefilled[request_id] = start + length
            self.check_workers(plan)
            self.check_admission(plan)

    def check_admission(self, plan):
        """Requests leave the queue from its head on, and chunks stand in the order of admission."""
        new = [name for row, name in enumerate(plan.request_ids) if not plan.context_lens[row]]
        waited = self.passed_by + self.queue
        assert new == [name for name in waited if name in new], "a chunk overtook"
        if self.config.segments == 1:
            assert new == waited[: len(new)], "somebody overtook"
            assert list(plan.request_ids[len(plan.request_ids) - len(new) :]) == new
        admitted = max([self.queue.index(name) + 1 for name in new if name in self.queue], default=0)
        self.passed_by = [name for name in self.passed_by + self.queue[:admitted] if name not in new]
        del self.queue[:admitted]

    def check_workers(self, plan):
        """Each row's pages are where the partition says."""
        limits = self.config
        if limits.partition != "requests" or plan.kind == "decode":
            assert plan.worker is None
        for row, request_id in enumerate(plan.request_ids):
            if not request_id:
                continue
            pages = plan.block_tables[row, : self.held[request_id]]
            owners = pages // limits.num_pages
            self.worker_of[request_id] = int(owners[0])
            if limits.partition == "tokens":
                counts = np.bincount(owners, minlength=limits.workers)
                assert counts.max() - counts.min() <= 1
                assert (np.diff(owners) % limits.workers == 1 % limits.workers).all()
            elif plan.worker is None:
                assert (owners == row // (plan.bucket[0] // limits.segments)).all()
            else:
                assert (owners == plan.worker).all()

    def check_head_of_queue(self, plan):
        """Whoever is first in the queue waits for seats, pages or its own tokens only."""
        if plan is None or plan.microbatches[-1].kind == "prefill" or not self.queue:
            return
        if self.scheduler.num_running < self.config.max_num_seqs and not self.is_in_flight(self.queue[0]):
            needed = self.first_pages(self.queue[0])
            assert not any(self.has_room(worker, needed) for worker in range(self.config.workers))

    def has_room(self, worker, needed):
        """Whether a request of so many pages could begin on a worker now."""
        free, W = self.scheduler.pages.free_by_worker, self.config.workers
        spare = len(self.growing(worker))
        if self.config.partition != "tokens":
            here = [name for name in self.live if self.worker_of.get(name) == worker]
            taken = len(here) + len(self.passed_by)  # whose worker has not been seen yet
            return taken < self.config.seats and free[worker] >= needed + spare
        dealt = [(worker + place) % W for place in range(needed)]
        return sum(free) >= needed + spare and all(dealt.count(w) <= free[w] for w in range(W))

    def check_counts(self):
        scheduler, pages = self.scheduler, self.scheduler.pages
        assert pages.num_free + pages.num_used == pages.num_pages == self.config.total_pages
        assert scheduler.waiting == self.queue
        assert scheduler.num_waiting == len(self.queue)
        assert scheduler.num_running == len(self.live) - len(self.queue) <= self.config.max_num_seqs
        running = set(self.live) - set(self.queue)
        assert sum(self.held.get(name, 0) for name in running) <= pages.num_used
        if self.config.segments > 1:
            seated = Counter(self.worker_of[name] for name in self.live if name in self.worker_of)
            assert max(seated.values(), default=0) <= self.config.seats
        assert scheduler.has_work == bool(self.live or self.in_flight)


def ids_of(microbatch):
    """The requests of a microbatch."""
    return [request_id for request_id in microbatch.request_ids if request_id]
