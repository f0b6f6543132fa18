"""The engine: requests in, outputs out, one step at a time.

It puts the scheduler, a model runner and the tokenizer together. A step is dispatched before the
tokens of the one before it are read, so that the devices always have work queued. Importing it loads no jax.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from lamina_jax.core import (
    FinishReason,
    MicrobatchPlan,
    QueueFull,
    Request,
    RequestOutput,
    Sampled,
    SamplingParams,
    StepPlan,
    TokenEvent,
    WorkerLost,
)
from lamina_jax.engine.outage import Outage
from lamina_jax.engine.outputs import Choice, PromptOutput, logprobs_at, prompt_logprobs_of
from lamina_jax.engine.runner import ClosableRunner, Elsewhere, ModelRunner, RecoverableRunner
from lamina_jax.engine.sampling_rows import check_edits
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.weights.tokenizer import Tokenizer

ERRAND_SECONDS = 0.01
"""How long a step waits at most for a prompt from elsewhere, where it has nothing else to do."""

CHECK_SECONDS = 0.2
"""Between two looks at whether a worker was lost, while there is nothing to dispatch."""


@runtime_checkable
class Counter(Protocol):
    """Counts what goes on elsewhere."""

    @property
    def count(self) -> int: ...


class Engine:
    """Continuous batching over a model runner.

    Args:
        scheduler: decides what runs; jax-free.
        runner: executes it.
        tokenizer: for prompts and outputs as text; None serves token ids alone.
        eos_token_ids: the ids with which the model ends a text.
        vocab_size: V; prompts with other ids are refused.
        facts: what does not change, for `stats()`.
        compilations: counts from when everything was compiled.
        elsewhere: prefills prompts on other hosts; None: they are prefilled here.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        facts: dict[str, Any] | None = None,
        compilations: Counter | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self.eos_token_ids, self.vocab_size = eos_token_ids, vocab_size
        self._facts, self._compilations = facts or {}, compilations
        self._elsewhere = elsewhere
        self._live: dict[str, PromptOutput] = {}
        self._choices: dict[str, tuple[PromptOutput, Choice]] = {}
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        self._recoverable = runner if isinstance(runner, RecoverableRunner) else None
        self._outage: Outage | None = None
        self._steps, self._host_seconds = 0, 0.0

    def request(self, request_id: str, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        """A request from text or token ids.

        Raises:
            ValueError: text, where the checkpoint has no tokenizer; or ids of a wrong type.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer.json: give the prompt as token ids")
            return Request(
                request_id=request_id,
                prompt_token_ids=tuple(self.tokenizer.encode(prompt)),
                sampling=sampling,
                prompt=prompt,
            )
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"a prompt is text or a list of token ids; got {token!r} in it")
        return Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling)

    def check(self, request: Request) -> None:
        """Refuse a request that this engine can never serve.

        Raises:
            ValueError: it is too long, names unknown token ids, asks for what needs a tokenizer that is not
                there, or is more choices than may wait.
        """
        self._check(request, self._children(request)[0])

    def submit(self, *requests: Request) -> None:
        """Queue requests with ids of their own: all of them, or none.

        Raises:
            ValueError: an id is in use, `check` refuses one, or they are more choices than may ever wait.
            QueueFull: they are more than may wait now; they can be sent again later.
        """
        families = [(request, self._children(request)) for request in requests]
        for request, children in families:
            ids = (request.request_id, *(child.request_id for child in children))
            if any(held in self._live or held in self._choices for held in ids):
                raise ValueError(f"request {ids[0]!r} is already held: use another request_id")
            self._check(request, children[0])
        count, most = sum(len(children) for _, children in families), self.scheduler.config.max_waiting
        if count > most:
            raise ValueError(
                f"{len(requests)} prompts of {count} choices are more than may wait: send fewer at once, or "
                f"raise max_waiting={most}"
            )
        if count > self.room:
            raise QueueFull(
                f"{self.scheduler.num_waiting} requests wait, and {count} more would exceed "
                f"max_waiting={most}: send it again later, or raise max_waiting"
            )
        for request, children in families:
            for child in children:
                self.scheduler.add(child)
            live = self._live[request.request_id] = PromptOutput(request, children, self.tokenizer)
            self._choices.update((choice.request.request_id, (live, choice)) for choice in live.choices)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; what is new of it, or None if the engine does not hold it."""
        live = self._live.get(request_id)
        if live is None:
            return None
        return self._end(live, "abort")

    def _check(self, request: Request, child: Request) -> None:
        """`check`, with the first of its choices, which the others are like."""
        sampling = request.sampling
        for name, tokens in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
            if wrong:
                raise ValueError(f"{name}: token id {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: stop needs one, use stop_token_ids")
        if sampling.n > (most := self.scheduler.config.max_waiting):
            raise ValueError(
                f"n={sampling.n} choices are more than may wait: lower n, or raise max_waiting={most}"
            )
        check_edits(child)
        self.scheduler.check(child)

    def _children(self, request: Request) -> list[Request]:
        """One request for each continuation, with what ends it and what it is drawn from."""
        sampling = request.sampling
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends.update(self.eos_token_ids)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
        request = replace(request, stop_token_ids=frozenset(ends), seed=seed)
        if sampling.n == 1:
            return [request]
        # The prompt is the same for all: the first tells its log-probabilities.
        others = replace(sampling, prompt_logprobs=None)
        return [
            replace(
                request,
                request_id=f"{request.request_id}#{choice}",
                choice=choice,
                sampling=others if choice else sampling,
            )
            for choice in range(sampling.n)
        ]

    def _end(self, live: PromptOutput, reason: FinishReason) -> RequestOutput:
        """End all of a request that has not ended; what is new of it."""
        for choice in live.choices:
            if not choice.finished:
                self.scheduler.abort(choice.request.request_id)
                choice.end(reason)
        self._forget(live)
        return live.news()

    def _forget(self, live: PromptOutput) -> None:
        del self._live[live.request.request_id]
        for choice in live.choices:
            self._choices.pop(choice.request.request_id, None)

    @property
    def room(self) -> int:
        """How many more requests may wait, each choice of a prompt being one."""
        return self.scheduler.room

    @property
    def has_work(self) -> bool:
        """Whether there is anything to dispatch or to read."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def lost(self) -> WorkerLost | None:
        """The attention worker that is lost, until it is back."""
        return self._outage.lost if self._outage is not None else None

    @property
    def pause(self) -> float | None:
        """Seconds for which `step` has nothing to do, unless something is submitted; None: for ever."""
        if self._outage is not None:
            return self._outage.seconds_left
        if self.has_work:
            return 0.0
        return CHECK_SECONDS if self._recoverable is not None else None

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, read the one before; what is new of the outputs that have changed.

        Where an attention worker is lost, every request that had begun ends with an error, and those that
        wait keep their places. While `lost`, a step is a try to get the worker back, once `pause` is over.
        """
        if self._outage is not None:
            if self._outage.ends():
                self._outage = None
            return []
        try:
            if self._recoverable is not None and not self._in_flight:
                self._recoverable.check()
            return self._advance()
        except WorkerLost as lost:
            if self._recoverable is None:
                raise
            self._outage = Outage(lost, self._recoverable.recover)
            return self._end_running(str(lost))
        except BaseException:
            self._end_running("the engine has failed at a step")  # which nobody can read any more
            raise

    def close(self) -> None:
        """Give back what the runner holds: attention workers; nothing can be dispatched any more."""
        if self._elsewhere is not None:
            self._elsewhere.close()
        if isinstance(self.runner, ClosableRunner):
            self.runner.close()

    def _end_running(self, error: str) -> list[RequestOutput]:
        """End with an error all requests of which something ran; nothing is in flight any more."""
        self._in_flight.clear()
        outputs, dropped = [], self.scheduler.drop_running()
        self._send_errands()  # at once: what is brought must not come to the cache after this one
        for request_id in dropped:
            if request_id in self._choices:  # else it has ended with another choice of its prompt
                live, _ = self._choices[request_id]
                live.error = error
                outputs.append(self._end(live, "error"))
        return outputs

    def _advance(self) -> list[RequestOutput]:
        started = time.perf_counter()
        plan = self._schedule()
        if plan is not None:
            self._in_flight.append((plan, self.runner.dispatch(plan)))
            self._steps += 1
            last = plan.microbatches[-1]
            for request_id in last.request_ids if last.kind == "prefill" else ():
                self._choices[request_id][0].admit()
        self._host_seconds += time.perf_counter() - started
        if self._elsewhere is not None and plan is None and not self._in_flight:
            self._elsewhere.wait(ERRAND_SECONDS)
        if not self._in_flight or (plan is not None and len(self._in_flight) == 1):
            return []
        done, dispatched = self._in_flight.popleft()
        results = self.runner.read(dispatched)
        started = time.perf_counter()
        changed: dict[str, PromptOutput] = {}
        for event in self.scheduler.update(done, [result.tokens for result in results]):
            live = self._take(event, done.microbatches[event.microbatch], results[event.microbatch])
            changed[live.request.request_id] = live
        outputs = [live.news() for live in changed.values()]
        for new in outputs:
            if new.finished:
                self._forget(changed[new.request_id])
        self._host_seconds += time.perf_counter() - started
        return outputs

    def _schedule(self) -> StepPlan | None:
        """The next step; and what prompts have come from elsewhere before it, and which are to come."""
        if self._elsewhere is None:
            return self.scheduler.schedule()
        for number, complete in self._elsewhere.over():
            self.scheduler.arrived(number, complete=complete)
        self.scheduler.elsewhere = self._elsewhere.available
        plan = self.scheduler.schedule()
        self._send_errands()
        return plan

    def _send_errands(self) -> None:
        if self._elsewhere is None:
            return
        begun, dropped = self.scheduler.errands()
        for errand in begun:
            if errand.request_id in self._choices:
                self._choices[errand.request_id][0].admit()
            self._elsewhere.begin(errand)
        for number in dropped:
            self._elsewhere.drop(number)

    def stats(self) -> dict[str, Any]:
        """Counters: requests, pages, host time per step, and the runner's own."""
        scheduler = self.scheduler
        return {
            "requests_running": scheduler.num_running,
            "requests_waiting": scheduler.num_waiting,
            "preemptions": scheduler.preemptions,
            "prompt_tokens": scheduler.prompt_tokens,
            "generation_tokens": scheduler.generation_tokens,
            "pages_free": scheduler.pages.num_free,
            "pages_used": scheduler.pages.num_used,
            "pages_total": scheduler.pages.num_pages,
            "steps": self._steps,
            "host_microseconds_per_step": 1e6 * self._host_seconds / max(self._steps, 1),
            "compilations_after_ready": self._compilations.count if self._compilations else 0,
            **self.runner.stats(),
            **(self._elsewhere.stats() if self._elsewhere is not None else {}),
            **self._facts,
        }

    def _take(self, event: TokenEvent, plan: MicrobatchPlan, result: Sampled) -> PromptOutput:
        """Bring one row's share of a step to its request."""
        live, choice = self._choices[event.request_id]
        sampling, row = choice.request.sampling, event.row
        if sampling.prompt_logprobs is not None and result.prompt_logprobs is not None:
            live.take_prompt(prompt_logprobs_of(result.prompt_logprobs, plan, row, sampling, self.tokenizer))
        if event.token_id is None:
            return live
        logprobs = None
        if sampling.logprobs is not None and result.logprobs is not None:
            logprobs = logprobs_at(result.logprobs, row, event.token_id, sampling.logprobs, self.tokenizer)
        choice.take(event.token_id, event.finish_reason, logprobs)
        if (
            choice.finished and event.finish_reason is None
        ):  # at a stop string, of which the scheduler knows not
            self.scheduler.abort(event.request_id)
        return live
