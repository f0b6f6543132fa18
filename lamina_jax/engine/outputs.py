"""What users see of a prompt: its continuations as text, and the log-probabilities of its tokens.

It turns token ids into outputs. It knows nothing of steps, pages or devices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lamina_jax.core import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Logprobs,
    MicrobatchPlan,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from lamina_jax.engine.stop_strings import StopStrings
from lamina_jax.weights.tokenizer import Detokenizer, Tokenizer


class Choice:
    """One continuation as it grows.

    Args:
        request: what the scheduler holds for it.

    Attributes:
        finished: no more tokens come.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request, self.finished = request, False
        self._detokenizer = Detokenizer(tokenizer, request.prompt_token_ids) if tokenizer else None
        self._stops = StopStrings(request.sampling.stop) if request.sampling.stop else None
        self._held, self._tokens = "", 0  # text that is not shown yet
        self._new: CompletionOutput | None = None

    def take(self, token: int, reason: FinishReason | None, logprobs: Logprobs | None) -> None:
        """Add a token. One that ends the text is kept among the ids, not in the text.

        A stop string ends the continuation here, before the scheduler knows: see `finished`.
        """
        new, sampling = self._news(), self.request.sampling
        new.token_ids.append(token)
        self._tokens += 1
        if new.logprobs is not None and logprobs is not None:
            new.logprobs.append(logprobs)
        if reason == "stop":
            new.stop_reason = token if token in sampling.stop_token_ids else None
        elif self._detokenizer is not None:
            self._held += self._detokenizer.push(token)
        if reason is not None:
            self.end(reason)
        elif self._stops is None:
            self._show(len(self._held))
        elif not self._stopped():
            self._show(self._stops.shown(self._held))

    def end(self, reason: FinishReason) -> None:
        """No more tokens come; what was held back of the text is shown, unless a stop string is in it."""
        if self._detokenizer is not None:
            self._held += self._detokenizer.flush()
        if reason != "length" or not self._stopped():
            self._show(len(self._held))
            self._news().finish_reason, self.finished = reason, True

    def news(self) -> CompletionOutput | None:
        """What is new since this was last asked; None if nothing is."""
        new, self._new = self._new, None
        return new

    def _news(self) -> CompletionOutput:
        if self._new is None:
            logprobs: list[Logprobs] | None = None if self.request.sampling.logprobs is None else []
            self._new = CompletionOutput(index=self.request.choice, logprobs=logprobs)
        return self._new

    def _show(self, count: int) -> None:
        """So many characters of what was held back may be seen."""
        if count:
            self._news().text += self._held[:count]
            self._held = self._held[count:]

    def _stopped(self) -> bool:
        """Whether a stop string is in what is new of the text; then it ends there."""
        if self._stops is None or self._tokens <= self.request.sampling.min_tokens:
            return False
        hit = self._stops.find(self._held)
        if hit is None:
            return False
        place, stop = hit
        self._show(place)
        new = self._news()
        new.finish_reason, new.stop_reason, self.finished = "stop", stop, True
        return True


class PromptOutput:
    """A prompt and its `sampling.n` continuations.

    Args:
        request: as it was submitted.
        children: what the scheduler holds for it, one for each choice.

    Attributes:
        error: why it ended, if it could not go on.
    """

    def __init__(self, request: Request, children: Sequence[Request], tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.choices = [Choice(child, tokenizer) for child in children]
        wanted = request.sampling.prompt_logprobs is not None
        self._prompt_logprobs: list[Logprobs | None] | None = [None] if wanted else None
        self.error: str | None = None
        self._waits_since: float | None = time.monotonic()
        self._queue_seconds: float | None = None

    def admit(self) -> None:
        """One of its choices has left the queue; the first time counts."""
        if self._waits_since is not None:
            self._queue_seconds, self._waits_since = time.monotonic() - self._waits_since, None

    def take_prompt(self, logprobs: Sequence[Logprobs]) -> None:
        """The log-probabilities of the next prompt tokens, of the first choice."""
        self._prompt_logprobs = [*(self._prompt_logprobs or []), *logprobs]

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    def news(self) -> RequestOutput:
        """What is new since this was last asked."""
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        queue_seconds, self._queue_seconds = self._queue_seconds, None
        return RequestOutput(
            request_id=self.request.request_id,
            outputs=[new for choice in self.choices if (new := choice.news())],
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            error=self.error,
            queue_seconds=queue_seconds,
        )


def logprobs_at(
    found: TokenLogprobs, row: int, token: int, count: int, tokenizer: Tokenizer | None
) -> Logprobs:
    """The entry of one token: itself, and the `count` best in its place."""
    text = tokenizer.text_of if tokenizer else _no_text
    entries = {token: Logprob(float(found.chosen[row]), int(found.ranks[row]), text(token))}
    best = zip(found.top_ids[row, :count].tolist(), found.top[row, :count].tolist(), strict=True)
    for rank, (other, logprob) in enumerate(best, start=1):
        entries[other] = Logprob(logprob, rank, text(other))
    return entries


def prompt_logprobs_of(
    found: TokenLogprobs,
    plan: MicrobatchPlan,
    row: int,
    sampling: SamplingParams,
    tokenizer: Tokenizer | None,
) -> list[Logprobs]:
    """The entries of the prompt tokens that follow those of one row of a chunk."""
    assert plan.prompt_targets is not None
    assert sampling.prompt_logprobs is not None
    _, width = plan.bucket
    targets = plan.prompt_targets[row * width : (row + 1) * width].tolist()
    return [
        logprobs_at(found, row * width + place, token, sampling.prompt_logprobs, tokenizer)
        for place, token in enumerate(targets)
        if token >= 0
    ]


def _no_text(token: int) -> None:
    """Of a token, where there is no tokenizer."""
