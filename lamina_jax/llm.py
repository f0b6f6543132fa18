"""The library's front door: `LLM(model).generate(prompts)`."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lamina_jax.config import EngineConfig
from lamina_jax.core import Request, RequestOutput, SamplingParams
from lamina_jax.engine.build import build_engine
from lamina_jax.pool.shard import CachedPart

WORKER_SECONDS = 60.0
"""How long `generate` waits for an attention worker that was lost before: it has to start and to compile."""

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model, loaded and compiled, with its layers and its attention placed as configured.

    Args:
        model: a Hugging Face folder, or "bundled".
        cached_part: a function with the signature and the contract of `pallas_kernels.paged_attention` that
            the memory mesh computes in its place; for placement=disaggregated.
        settings: any field of `lamina_jax.config.EngineConfig`: placement, dtype, max_model_len,
            max_num_seqs, memory_fraction, microbatches, overlap, compute_devices, memory_devices, ...

    Raises:
        ConfigError: a setting that cannot be obeyed.
        CheckpointError: a folder that cannot be loaded.
    """

    def __init__(
        self, model: str = "bundled", *, cached_part: CachedPart | None = None, **settings: Any
    ) -> None:
        self.config = EngineConfig(model=model, **settings)
        self.engine = build_engine(self.config, cached_part=cached_part)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, however many; the outputs in the order of the prompts.

        Args:
            prompts: one or several, each a string or a list of token ids.
            sampling_params: one for all, or one for each.

        Raises:
            ValueError: a prompt that cannot be served; then none is.
            WorkerLost: an attention worker was lost on the way; or it was lost before, and has not come
                back within `WORKER_SECONDS`. It can be called again.
        """
        requests = deque(self._requests(_as_list(prompts), sampling_params))
        for request in requests:
            self.engine.check(request)
        outputs = {
            request.request_id: RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=list(request.prompt_token_ids),
            )
            for request in requests
        }
        unfinished = len(outputs)
        try:
            while unfinished:
                while requests and requests[0].sampling.n <= self.engine.room:
                    self.engine.submit(requests.popleft())
                self._wait_for_worker()
                news = self.engine.step()
                if news and self.engine.lost is not None:  # they have ended with an error
                    raise self.engine.lost
                for new in news:
                    if new.request_id in outputs:  # the engine may hold requests of others, too
                        outputs[new.request_id].extend(new)
                        unfinished -= new.finished
        finally:
            for request_id, output in outputs.items():
                if not output.finished:
                    self.engine.abort(request_id)
            while self.engine.has_work and self.engine.lost is None:
                self.engine.step()
        return list(outputs.values())

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer every conversation, written as the checkpoint's chat template says.

        Args:
            messages: one conversation or several, each a list of `{"role", "content"}`; see
                `lamina_jax.weights.chat_template.ChatTemplate.render`.
            sampling_params: one for all, or one for each.
            add_generation_prompt: end each prompt with the beginning of the assistant's answer.
            chat_template_kwargs: more variables that the template looks at.

        Raises:
            ValueError: no chat template; a message that cannot be honoured; a prompt that cannot be served.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(f"the model {self.config.model!r} has no chat template: use generate()")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = []
        for conversation in conversations:
            text = tokenizer.chat_template.render(
                conversation,  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                variables=chat_template_kwargs,
            )
            prompts.append(tokenizer.encode(text, special_tokens=False))
        return self.generate(prompts, sampling_params)

    def stats(self) -> dict[str, Any]:
        """What the engine counts.

        Requests running and waiting; preemptions; tokens of prompts and tokens generated; pages free, used
        and in all; steps; host time per step and of it the dispatch; programs, wire bytes and messages per
        step (step metadata apart); compilations after ready; and the facts of the start: placement,
        microbatches, overlap, the devices that hold weights and those that hold pages.
        """
        return self.engine.stats()

    def close(self) -> None:
        """Give attention workers back, and end the other compute hosts, where there are some.

        `with LLM(...) as llm` does it at the end.
        """
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait_for_worker(self) -> None:
        """Until no worker is lost. Raises `WorkerLost` where that takes too long."""
        deadline = time.monotonic() + WORKER_SECONDS
        while (lost := self.engine.lost) is not None:
            if time.monotonic() >= deadline:
                raise lost
            time.sleep(self.engine.pause or 0.0)
            self.engine.step()

    def _requests(
        self, prompts: list[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(sampling)} sampling_params: give one, or one for each"
            )
        return [
            self.engine.request(f"generate-{next(self._numbers)}", prompt, params)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
