"""The scheduler: which requests get a token in the next step, and what the tokens mean that come back.

It owns the waiting queue, the decode microbatches and the steps in flight. It knows nothing of weights,
devices or jax: it deals in requests, pages and integers.

    plan = scheduler.schedule()                # step t + 1, while step t is still in flight
    events = scheduler.update(oldest, tokens)  # the tokens of step t, once they are read

Where prompts are prefilled elsewhere, `errands` tells what is to be brought, and `arrived` that it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamina_jax.core import FinishReason, Request, StepPlan, TokenEvent
from lamina_jax.engine.admission import Admission
from lamina_jax.engine.errands import Errand, Errands
from lamina_jax.engine.prefill import choose_bucket, plan_prefill
from lamina_jax.engine.rows import DecodeRows, LiveRequest, PlannedMicrobatch, Rows
from lamina_jax.engine.scheduler_config import SchedulerConfig

__all__ = ["Errand", "Scheduler", "SchedulerConfig"]

# One step runs while the next one is planned: its tokens are fed back on the device, unseen here.
_MAX_STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A plan handed out, and the requests behind its rows. Ids do not do: one may be in use again."""

    plan: StepPlan
    requests: tuple[Rows, ...]


class Scheduler:
    """Continuous batching in first-come, first-served order.

    A request waits, is prefilled in chunks, and decodes in one microbatch until it ends. It is
    admitted when a worker has a seat and pages for its tokens, and takes one more page at a time as it
    grows. When pages run out the youngest requests are preempted: they give their pages back and take
    their places in the queue, which is in the order of arrival; once admitted again they prefill all their
    tokens, and go on. So nobody is overtaken, and the oldest request always advances.

    While `elsewhere` is set, who is admitted does not prefill: it waits, with its pages and its seat, for the
    KV of all its tokens but the last, and decodes from there. A prompt of one token, and one whose
    log-probabilities are asked for, is prefilled here all the same.

    `abort` is allowed at any moment. Not safe for use by several threads.

    Attributes:
        config: its limits.
        pages: the page pool; `num_free`, `num_used` and `num_pages` are its counts.
        elsewhere: whether prompts can be prefilled elsewhere now.
        preemptions: how often a request was preempted.
        prompt_tokens: tokens of the prompts of all requests that got a token.
        generation_tokens: tokens that requests got.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._admission = Admission(config)
        self.pages = self._admission.pages
        self._requests: dict[str, LiveRequest] = {}
        self._waiting: dict[str, LiveRequest] = {}
        self._prefilling: list[LiveRequest] = []
        self._decode = [DecodeRows(microbatch, config) for microbatch in range(config.microbatches)]
        self._in_flight: deque[_StepInFlight] = deque()
        self._next_step = self._arrivals = 0
        self.elsewhere, self._errands = False, Errands()
        self.preemptions = self.prompt_tokens = self.generation_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, those that were preempted included: they hold no pages."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[str]:
        """The ids of the queue, the next one first."""
        return list(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages and a seat: at most `max_num_seqs`."""
        return self._admission.num_running

    @property
    def has_work(self) -> bool:
        """A request has not ended, or a step is in flight and must still be given to `update`, or an errand
        that was dropped is not over."""
        return bool(self._requests or self._in_flight or self.pages.errands)

    @property
    def room(self) -> int:
        """How many more requests the queue takes within `max_waiting`."""
        return max(0, self.config.max_waiting - len(self._waiting))

    def check(self, request: Request) -> None:
        """Refuse a request that can never be served.

        Raises:
            ValueError: the prompt is empty or longer than `max_model_len` - 1, or the request alone needs
                more pages than there are.
        """
        self._live(request)

    def add(self, request: Request) -> None:
        """Queue a request. Its `max_tokens` is clipped to what fits `max_model_len`.

        Who adds more than there is `room` for bounds the queue in another way.

        Raises:
            ValueError: the id is held already, or the request can never be served.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is already held: use another request_id")
        live = self._live(request)
        live.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.request_id] = live
        self._waiting[request.request_id] = live

    def abort(self, request_id: str) -> None:
        """End a request at any moment; an id that is not held is left alone.

        No `TokenEvent` follows, now or at `update`: the caller knows what it aborted. Pages that a
        step in flight names stay used until that step is given to `update`.
        """
        if request_id in self._requests:
            self._end(self._requests[request_id])

    def schedule(self) -> StepPlan | None:
        """Plan the next step: a token for every decode row, and chunks of prompts.

        Returns None when there is nothing to dispatch now: no work, two steps in flight, every request
        waits for tokens of a step in flight or for its KV, or one that decodes for a page of it.
        """
        if len(self._in_flight) == _MAX_STEPS_IN_FLIGHT or not self._grow():
            return None
        step = self._next_step
        planned = [decode for rows in self._decode if (decode := rows.plan(step))]
        if prefill := self._prefill(step, decoding=bool(planned)):
            planned.append(prefill)
        if not planned:
            return None
        microbatches, requests = zip(*planned, strict=True)
        plan = StepPlan(step=step, microbatches=microbatches)
        self._in_flight.append(_StepInFlight(plan, requests))
        self._next_step += 1
        return plan

    def update(self, plan: StepPlan, tokens: Sequence[np.ndarray]) -> list[TokenEvent]:
        """Take in the tokens of the oldest step in flight.

        Args:
            plan: what `schedule` returned; plans are given back in that order.
            tokens: int32[B] for each of its microbatches; what padding rows hold is ignored.

        Returns:
            One event per live request of the plan that got a token; and, where log-probabilities of a
            prompt are asked for, one without a token per chunk that does not end its prompt. Tokens of
            requests that ended before, by a stop token seen one step late or by `abort`, are dropped.

        Raises:
            ValueError: `plan` is not the oldest in flight, or `tokens` do not have its shapes. The
                step stays in flight.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            in_flight = [step.plan.step for step in self._in_flight]
            raise ValueError(f"step {plan.step} is not the oldest in flight ({in_flight}): update in order")
        chosen = _checked(plan, tokens)
        requests = self._in_flight.popleft().requests
        self.pages.complete(plan.step)
        events: list[TokenEvent] = []
        prefilled: list[LiveRequest] = []
        for index, (microbatch, rows, row_tokens) in enumerate(
            zip(plan.microbatches, requests, chosen, strict=True)
        ):
            events += self._read(index, rows, microbatch.samples.tolist(), row_tokens.tolist())
            if microbatch.kind == "decode":
                self._decode[microbatch.microbatch].read(plan.step, row_tokens)
                continue
            prefilled = [live for row, live in enumerate(rows) if live and microbatch.samples[row]]
            if microbatch.prompt_targets is not None:
                events += [
                    _of_prompt(index, row, request)
                    for row, request in enumerate(rows)
                    if request and not (microbatch.samples[row] or request.ended)
                ]
        self._start_decoding(prefilled)
        return events

    def errands(self) -> tuple[list[Errand], list[int]]:
        """What is to be begun elsewhere, and the numbers of errands to be dropped, since this was asked last.

        Each that is begun is told to `arrived` when it is over, dropped or not: only then are the pages of a
        request that ended meanwhile free.
        """
        return self._errands.news()

    def arrived(self, number: int, *, complete: bool) -> None:
        """An errand is over, and writes to no page any more.

        Args:
            complete: all that it was to bring is there. Otherwise its request prefills here.
        """
        self.pages.errand_over(number)
        request = self._errands.over(number)
        if request is None:
            return
        if complete and not (request.request.sampling.penalised and not request.planned):
            self._start_decoding([request])
            return
        # A decode row counts its input among the generated tokens, and that would be the prompt's last one.
        request.prefilled = len(request.tokens) - 1 if complete else 0
        self._prefilling.append(request)

    def drop_running(self) -> list[str]:
        """End every request that runs, and forget the steps in flight: their cache is lost.

        All pages are free afterwards. Requests that wait keep their places, but for those that were
        preempted in a step that is lost.

        Returns:
            The ids of those that were ended; no `TokenEvent` follows for them.
        """
        completed = self.pages.completed
        dropped = [live for live in self._requests.values() if live.running or live.last_step > completed]
        for live in dropped:
            self._end(live)
        self._in_flight.clear()
        self.pages.complete(self._next_step - 1)
        for errand in self.pages.errands:  # writes to a cache that is lost
            self.pages.errand_over(errand)
        return [live.request.request_id for live in dropped]

    def check_idle(self) -> None:
        """With nothing held, every page is free; a RuntimeError says how many are lost."""
        if not self.has_work and self.pages.num_used:
            raise RuntimeError(
                f"the scheduler is idle but {self.pages.num_used} of {self.pages.num_pages} pages are in use"
            )

    def _live(self, request: Request) -> LiveRequest:
        live = LiveRequest(request, self._max_tokens(request))
        num_pages = self.pages.pages_for(live.most_cached)
        if num_pages > self.config.most_pages:
            holder = {"heads": "the pool has", "requests": "each worker has"}.get(
                self.config.partition, f"each of {self.config.workers} workers has"
            )
            raise ValueError(
                f"request {request.request_id!r}: {live.prompt_len} prompt tokens and {live.max_tokens} new "
                f"ones need {num_pages} pages, {holder} num_pages={self.config.num_pages} (page_size="
                f"{self.config.page_size}): lower max_tokens, shorten the prompt or raise num_pages"
            )
        return live

    def _max_tokens(self, request: Request) -> int:
        """How many tokens `request` may generate; ValueError if its prompt cannot be served."""
        length, limits = len(request.prompt_token_ids), self.config
        name = f"request {request.request_id!r}"
        if length == 0:
            raise ValueError(f"{name}: the prompt is empty, give at least one token id")
        if length >= limits.max_model_len:
            raise ValueError(
                f"{name}: a prompt of {length} tokens leaves no room for a new one within "
                f"max_model_len={limits.max_model_len}: shorten the prompt or raise max_model_len"
            )
        return min(request.sampling.max_tokens, limits.max_model_len - length)

    def _grow(self) -> bool:
        """Give every row whose next token needs a page one; whether the rows can be planned.

        Who is preempted in a step in flight gives pages back when that is complete: until then nothing
        is planned, so that no row is left behind by the others of its microbatch.
        """
        while True:
            for rows in self._decode:
                rows.pack()
            growing = [(rows, place, live) for rows in self._decode for place, live in rows.growing()]
            requests = [live for _, _, live in growing]
            youngest = self._admission.to_preempt(requests) if requests else None
            if youngest is None:
                break
            self._preempt(youngest)
        if not self._admission.grow(requests):
            return False
        for rows, place, live in growing:
            rows.add_page(place, live.pages[-1])
        return True

    def _preempt(self, live: LiveRequest) -> None:
        """Back to the queue. Tokens of steps in flight are still read, before it is admitted again."""
        self._release(live)
        self._prefilling = [other for other in self._prefilling if other is not live]
        waiting = [*self._waiting.values(), live]
        self._waiting = {r.request.request_id: r for r in sorted(waiting, key=lambda r: r.arrival)}
        self.preemptions += 1

    def _prefill(self, step: int, *, decoding: bool) -> PlannedMicrobatch | None:
        """The next chunks, of requests admitted before and, behind them, of those admitted now.

        Only requests of one worker share rows: by request, those of the first one's. Whoever is passed
        by for that is admitted all the same, so that nobody is overtaken in the queue.
        """
        admitted = self._admission.admissible(self._waiting.values())
        if self.elsewhere:
            admitted = [request for request in admitted if not self._send_away(request)]
        candidates = self._prefilling + admitted
        if not candidates:
            return None
        segment = self.config.segment(candidates[0].worker)
        together = [r for r in candidates if self.config.segment(r.worker) == segment]
        lengths = [len(request.tokens) - request.prefilled for request in together]
        bucket = choose_bucket(self.config, lengths, decoding=decoding)
        chosen = tuple(together[: bucket[0]])
        while admitted and admitted[-1] not in chosen:
            admitted.pop()
        for request in admitted:
            self._admit(request)
        plan = plan_prefill(step, chosen, bucket, self.config)
        ready = {request for row, request in enumerate(chosen) if plan.samples[row]}
        self._prefilling = [request for request in self._prefilling + admitted if request not in ready]
        return plan, chosen

    def _send_away(self, request: LiveRequest) -> bool:
        """Admit a request and have its KV brought, unless it must prefill here; whether that was done."""
        if len(request.tokens) < 2 or request.request.sampling.prompt_logprobs is not None:
            return False
        self._admit(request)
        self._errands.begin(request)
        return True

    def _admit(self, request: LiveRequest) -> None:
        del self._waiting[request.request.request_id]
        self._admission.admit(request)

    def _release(self, request: LiveRequest) -> None:
        """Give a running request's seat and pages back."""
        self._admission.release(request)
        self._errands.drop(request)

    def _read(
        self, microbatch: int, rows: Rows, samples: Sequence[bool], tokens: Sequence[int]
    ) -> list[TokenEvent]:
        """What the new token of each row means; requests that end give their pages back."""
        events = []
        for row, live in enumerate(rows):
            if live is None or live.ended or not samples[row]:
                continue
            token = tokens[row]
            live.tokens.append(token)
            generated = len(live.tokens) - live.prompt_len
            reason: FinishReason | None = None
            if token in live.request.stop_token_ids:
                reason = "stop"
            elif generated == live.max_tokens:
                reason = "length"
            if generated == 1:
                self.prompt_tokens += live.prompt_len
            if reason:
                self._end(live)
            events.append(TokenEvent(live.request.request_id, token, reason, microbatch, row))
        self.generation_tokens += len(events)
        return events

    def _start_decoding(self, prefilled: Sequence[LiveRequest]) -> None:
        """Give each request that was prefilled and goes on a row in the emptiest decode microbatch."""
        for rows in self._decode if prefilled else ():
            rows.pack()
        for request in prefilled:
            if request.running:
                worker = request.worker
                min(self._decode, key=lambda rows: rows.load(worker)).join(request)

    def _end(self, request: LiveRequest) -> None:
        """The request gets no more tokens. Its pages follow the last step that names it."""
        request.ended = True
        del self._requests[request.request.request_id]
        if request.running:
            self._release(request)
        else:
            del self._waiting[request.request.request_id]
        self._prefilling = [other for other in self._prefilling if other is not request]


def _checked(plan: StepPlan, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`tokens` as arrays; ValueError unless they are int[B] for each microbatch of `plan`."""
    chosen = [np.asarray(row_tokens) for row_tokens in tokens]
    expected = [(microbatch.bucket[0],) for microbatch in plan.microbatches]
    if [array.shape for array in chosen] != expected or any(array.dtype.kind not in "iu" for array in chosen):
        got = [f"{array.dtype}{list(array.shape)}" for array in chosen]
        raise ValueError(f"step {plan.step} needs tokens of shapes {expected} in an integer dtype, got {got}")
    return chosen


def _of_prompt(microbatch: int, row: int, request: LiveRequest) -> TokenEvent:
    return TokenEvent(request_id=request.request.request_id, token_id=None, microbatch=microbatch, row=row)
