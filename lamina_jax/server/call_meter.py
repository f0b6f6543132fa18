"""Follows the tokens of one call, for the metrics and for the log line of its HTTP request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamina_jax.core import RequestOutput
from lamina_jax.server.metrics import ServerMetrics
from lamina_jax.server.request_log import RequestRecord


@dataclass
class _Request:
    """One choice of one prompt; `newest`: when its newest token came."""

    prompt_tokens: int
    generated: int = 0
    newest: float = 0.0


class CallMeter:
    """What one call adds to the metrics.

    Args:
        record: of its HTTP request, from whose beginning seconds are counted; it is filled.
        prompt_lengths: tokens of each of its prompts.
        choices: of each prompt.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        record: RequestRecord,
        call_id: str,
        prompt_lengths: Sequence[int],
        choices: int,
    ) -> None:
        self._metrics, self._record = metrics, record
        record.call_id = call_id
        record.prompt_tokens, record.completion_tokens = sum(prompt_lengths), 0
        self._running = {
            (prompt, choice): _Request(length)
            for prompt, length in enumerate(prompt_lengths)
            for choice in range(choices)
        }

    def take(self, prompt: int, news: RequestOutput) -> None:
        """What is new of a prompt's choices; to be told as soon as it is known."""
        now = self._record.elapsed()
        if news.queue_seconds is not None:
            self._metrics.queue.observe(news.queue_seconds)
            self._record.queue_seconds = max(self._record.queue_seconds or 0.0, news.queue_seconds)
        for choice in news.outputs:
            request = self._running[prompt, choice.index]
            if choice.token_ids:
                self._take_tokens(request, len(choice.token_ids), now)
            if choice.finish_reason is not None:
                self._end(self._running.pop((prompt, choice.index)), choice.finish_reason, now)

    def close(self, error: str | None) -> None:
        """What has not ended ends here: with an error, of which this is the code, or its client has left."""
        now = self._record.elapsed()
        self._record.error = error or self._record.error
        while self._running:
            _, request = self._running.popitem()
            self._end(request, "abort" if error is None else "error", now)

    def _take_tokens(self, request: _Request, count: int, now: float) -> None:
        if request.generated:
            self._metrics.between_tokens.observe(now - request.newest)
        else:
            self._metrics.first_token.observe(now)
            self._metrics.prompt_tokens.inc(request.prompt_tokens)
            if self._record.first_token_seconds is None:
                self._record.first_token_seconds = now
        request.generated += count
        request.newest = now
        self._metrics.generation_tokens.inc(count)
        self._record.completion_tokens = (self._record.completion_tokens or 0) + count

    def _end(self, request: _Request, reason: str, now: float) -> None:
        self._record.finish_reasons[reason] += 1
        self._metrics.ended(reason).inc()
        if reason in ("stop", "length"):
            self._metrics.latency.observe(now)
            self._metrics.prompt_lengths.observe(request.prompt_tokens)
            self._metrics.generated_lengths.observe(request.generated)
