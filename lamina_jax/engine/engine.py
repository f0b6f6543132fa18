"""The engine: requests in, outputs out, one step at a time.

It puts the scheduler, a model runner and the tokenizer together. A step is dispatched before the
tokens of the one before it are read, so that the devices always have work queued.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lamina_jax.compilation import CompilationCounter
from lamina_jax.core import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    StepPlan,
    TokenEvent,
)
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.weights.tokenizer import Detokenizer, Tokenizer


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
        compilations: CompilationCounter | None = None,
    ) -> None:
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self.eos_token_ids, self.vocab_size = eos_token_ids, vocab_size
        self._facts, self._compilations = facts or {}, compilations
        self._live: dict[str, _Live] = {}
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
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

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it cannot be served (too long, unknown token ids, an id in use); nothing else
                is affected.
        """
        wrong = [token for token in request.prompt_token_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(f"prompt token id {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        ends = set(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends.update(self.eos_token_ids)
        request = replace(request, stop_token_ids=frozenset(ends))
        self.scheduler.add(request)
        self._live[request.request_id] = _Live(request, self.tokenizer)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its last output, or None if the engine does not hold it."""
        live = self._live.pop(request_id, None)
        if live is None:
            return None
        self.scheduler.abort(request_id)
        return live.take(None, "abort")

    @property
    def has_work(self) -> bool:
        """Whether there is anything to dispatch or to read."""
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, read the one before; the outputs that have changed."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self.runner.dispatch(plan)))
            self._steps += 1
        self._host_seconds += time.perf_counter() - started
        if not self._in_flight or (plan is not None and len(self._in_flight) == 1):
            return []
        done, dispatched = self._in_flight.popleft()
        tokens = self.runner.read(dispatched)
        started = time.perf_counter()
        outputs = [self._output(event) for event in self.scheduler.update(done, tokens)]
        self._host_seconds += time.perf_counter() - started
        return outputs

    def stats(self) -> dict[str, Any]:
        """Counters: requests, pages, host time per step, and the runner's own."""
        scheduler = self.scheduler
        return {
            "requests_running": scheduler.num_running,
            "requests_waiting": scheduler.num_waiting,
            "pages_free": scheduler.pages.num_free,
            "pages_used": scheduler.pages.num_used,
            "pages_total": scheduler.pages.num_pages,
            "steps": self._steps,
            "host_microseconds_per_step": 1e6 * self._host_seconds / max(self._steps, 1),
            "compilations_after_ready": self._compilations.count if self._compilations else 0,
            **self.runner.stats(),
            **self._facts,
        }

    def _output(self, event: TokenEvent) -> RequestOutput:
        live = self._live[event.request_id]
        if event.finish_reason is not None:
            del self._live[event.request_id]
        return live.take(event.token_id, event.finish_reason)


class _Live:
    """A request that the engine holds, and its output so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._detokenizer = (
            Detokenizer(tokenizer, request.prompt_token_ids) if tokenizer is not None else None
        )
        self._text: list[str] = []
        self._token_ids: list[int] = []

    def take(self, token_id: int | None, finish_reason: FinishReason | None) -> RequestOutput:
        """Add a token (the one that ends a text is kept among the ids, not in the text)."""
        request, stop_reason = self._request, None
        if token_id is not None:
            self._token_ids.append(token_id)
            if finish_reason == "stop":
                stop_reason = token_id if token_id in request.sampling.stop_token_ids else None
            elif self._detokenizer is not None:
                self._text.append(self._detokenizer.push(token_id))
        if finish_reason is not None and self._detokenizer is not None:
            self._text.append(self._detokenizer.flush())
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    text="".join(self._text),
                    token_ids=list(self._token_ids),
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                )
            ],
            finished=finish_reason is not None,
        )
