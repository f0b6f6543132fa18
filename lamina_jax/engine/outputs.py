"""What users see of a prompt: its continuations as text, and the log-probabilities of its tokens.

It turns token ids into outputs. It knows nothing of steps, pages or devices.
"""

from __future__ import annotations

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

    Attributes:
        request: what the scheduler holds for it.
        output: the continuation so far.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        sampling = request.sampling
        self.output = CompletionOutput(
            index=request.choice, logprobs=None if sampling.logprobs is None else []
        )
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, request.prompt_token_ids) if tokenizer else None
        self._stops = StopStrings(sampling.stop)
        self._text, self._searched = "", 0

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def take(self, token: int, reason: FinishReason | None, logprobs: Logprobs | None) -> None:
        """Add a token. One that ends the text is kept among the ids, not in the text.

        A stop string ends the continuation here, before the scheduler knows: see `finished`.
        """
        output, sampling = self.output, self.request.sampling
        output.token_ids.append(token)
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(logprobs)
        if reason == "stop":
            output.stop_reason = token if token in sampling.stop_token_ids else None
        elif self._detokenizer is not None:
            self._text += self._detokenizer.push(token)
        if reason is not None:
            self.end(reason)
        elif not self._stopped():
            self._searched = len(self._text)
            output.text = self._stops.shown(self._text)

    def end(self, reason: FinishReason) -> None:
        """No more tokens come; what was held back of the text is shown, unless a stop string is in it."""
        if self._detokenizer is not None:
            self._text += self._detokenizer.flush()
        if reason != "length" or not self._stopped():
            self.output.text, self.output.finish_reason = self._text, reason

    def _stopped(self) -> bool:
        """Whether a stop string is in what is new of the text; then it ends there."""
        enough = len(self.output.token_ids) > self.request.sampling.min_tokens
        hit = self._stops.find(self._text, self._searched) if enough else None
        if hit is None:
            return False
        place, stop = hit
        self.output.text = self._text[:place]
        self.output.finish_reason, self.output.stop_reason = "stop", stop
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

    def take_prompt(self, logprobs: Sequence[Logprobs]) -> None:
        """The log-probabilities of the next prompt tokens, of the first choice."""
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.extend(logprobs)

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    def output(self) -> RequestOutput:
        """All of it so far, as an object of its own."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=[_copy(choice.output) for choice in self.choices],
            finished=self.finished,
            prompt_logprobs=None if self._prompt_logprobs is None else list(self._prompt_logprobs),
            error=self.error,
        )


def _copy(output: CompletionOutput) -> CompletionOutput:
    return CompletionOutput(
        index=output.index,
        text=output.text,
        token_ids=list(output.token_ids),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        logprobs=None if output.logprobs is None else list(output.logprobs),
    )


def logprobs_at(
    found: TokenLogprobs, row: int, token: int, count: int, tokenizer: Tokenizer | None
) -> Logprobs:
    """The entry of one token: itself, and the `count` best in its place."""
    ids: list[int] = found.top_ids[row, :count].tolist()
    entries = {
        other: Logprob(float(found.top[row, place]), place + 1, _text(tokenizer, other))
        for place, other in enumerate(ids)
    }
    rank = int(found.ranks[row])
    return {token: Logprob(float(found.chosen[row]), rank, _text(tokenizer, token))} | entries


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


def _text(tokenizer: Tokenizer | None, token: int) -> str | None:
    """One token alone, special tokens too."""
    return tokenizer.inner.decode([token], skip_special_tokens=False) if tokenizer else None
