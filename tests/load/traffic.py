"""Requests of all kinds at random: what each one says, and a client that sends it and may leave early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import numpy as np
from fake_server import MODEL, text_of

from lamina_jax import LLM, SamplingParams
from lamina_jax.core import RequestOutput

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": -1, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"temperature": 1.2, "seed": 2**62, "frequency_penalty": 1.0, "logit_bias": {7: 5.0, 8: -100.0}},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1.0, "seed": 11, "n": 3, "min_tokens": 4, "stop_token_ids": [1, 2, 3]},
    {"temperature": 1.0, "seed": 5, "stop": ["a", "Q7", "~"]},
    {"temperature": 0.9, "seed": 8, "n": 2, "stop": ["e", "XY"], "logprobs": 0},
]
"""None depends on chance."""

Leaves = Literal["never", "soon", "accepted", "midway"]
"""When its client closes the connection: not at all; some milliseconds after it has sent the request; with
the head of the answer, while the request waits or is prefilled; or in the middle of the stream."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request. `prompt`: token ids, or the contents that user and assistant take turns in."""

    at: float
    prompt: list[int] | list[str]
    sampling: dict[str, Any]
    stream: bool
    leaves: Leaves
    patience: float

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt[0], str)

    @property
    def messages(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": str(content)} for i, content in enumerate(self.prompt)]

    @property
    def tokens(self) -> int:
        """At most, of one choice, prompt included."""
        prompt = sum(len(m["role"]) + len(m["content"]) + 3 for m in self.messages) if self.is_chat else 0
        return (prompt or len(self.prompt)) + int(self.sampling["max_tokens"])

    def body(self, model: str) -> dict[str, Any]:
        what = {"messages": self.messages} if self.is_chat else {"prompt": self.prompt}
        body = {"model": model, "stream": self.stream, "return_token_ids": True} | what | self.sampling
        if self.is_chat and "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        return body


def cases(count: int, rate: float, seed: int) -> list[Case]:
    """Poisson arrivals; a fifth of them chats, half of them streamed, a third of them left early."""
    random = np.random.default_rng(seed)
    at = np.cumsum(random.exponential(1 / rate, size=count))
    return [_case(float(moment), random) for moment in at]


def _case(at: float, random: np.random.Generator) -> Case:
    ids = random.integers(MODEL.vocab_size, size=int(random.choice([1, 4, 7, 8, 21, 40, 90]))).tolist()
    chats = random.random() < 0.2
    prompt = [text_of(part.tolist()) for part in np.array_split(ids[:30], 3) if len(part)] if chats else ids
    leaves = random.choice(["never", "soon", "accepted", "midway"], p=[0.67, 0.11, 0.11, 0.11])
    kind = KINDS[random.integers(len(KINDS))]
    return Case(
        at=at,
        prompt=prompt,
        sampling={"max_tokens": int(random.integers(5, 160)), **kind},
        stream=bool(leaves in ("accepted", "midway") or random.random() < 0.4),
        leaves=leaves.item(),
        patience=float(random.uniform(0, 0.3)),
    )


@dataclass
class Choice:
    """A continuation, as a client has it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


Answer = dict[int, Choice]
"""By index."""


def alone(llm: LLM, case: Case) -> Answer:
    """What the library gives the case when it has nothing else to do."""
    sampling = SamplingParams(**case.sampling)
    (output,) = llm.chat(case.messages, sampling) if case.is_chat else llm.generate([case.prompt], sampling)  # type: ignore[list-item]
    return _choices(output)


def _choices(output: RequestOutput) -> Answer:
    return {
        choice.index: Choice(choice.token_ids, choice.text, choice.finish_reason) for choice in output.outputs
    }


async def send(session: aiohttp.ClientSession, url: str, model: str, case: Case) -> Answer | None:
    """What came of a case; None where the client has left."""
    await asyncio.sleep(case.at)
    route = "/v1/chat/completions" if case.is_chat else "/v1/completions"
    try:
        async with asyncio.timeout(case.patience if case.leaves == "soon" else None):
            async with session.post(f"{url}{route}", json=case.body(model)) as response:
                assert response.status == 200, (case, await response.text())
                if case.leaves == "accepted":
                    return None
                return await (_read_stream if case.stream else _read_whole)(response, case)
    except TimeoutError:
        assert case.leaves == "soon", "the server is too slow"
        return None


async def _read_whole(response: aiohttp.ClientResponse, case: Case) -> Answer:
    answer: Answer = {}
    _take(answer, await response.json())
    return answer


async def _read_stream(response: aiohttp.ClientResponse, case: Case) -> Answer | None:
    answer: Answer = {}
    events = 0
    async for event in _events(response):
        if event == "[DONE]":
            return answer
        _take(answer, json.loads(event))
        events += 1
        if case.leaves == "midway" and events == 4:
            return None
    raise AssertionError(f"no [DONE] after {events} events of {case}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        if line.strip():
            yield line.decode().removeprefix("data: ").strip()


def _take(answer: Answer, body: dict[str, Any]) -> None:
    assert "error" not in body, body
    for told in body["choices"]:
        choice = answer.setdefault(told["index"], Choice())
        assert choice.finish_reason is None, "nothing comes after the end"
        choice.token_ids += told["token_ids"]
        choice.text += (
            told.get("text") or (told.get("message") or told.get("delta") or {}).get("content") or ""
        )
        choice.finish_reason = told["finish_reason"]
