"""Sends planned requests to a server that speaks OpenAI's completions, and notes when tokens come.

Every request is streamed. Needs aiohttp, the extra `bench`; knows nothing of what the figures are for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from lamina_jax.benchmarks.latencies import Record
from lamina_jax.benchmarks.workload import Planned

ASK_SECONDS = 30.0
"""What a question about the server may take."""

UNFINISHED = "the stream ended before [DONE]"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whom the requests go to, and what they all have in common.

    Attributes:
        url: without /v1.
        model: the name under which the model is served.
        api_key: sent as a bearer token.
        ignore_eos: every continuation has `max_tokens` tokens.
        seconds: longest time of a request, from sent to its last byte.
    """

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = False
    seconds: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def body(self, request: Planned) -> dict[str, Any]:
        """Of a completion. With `return_token_ids` every token is told, also one that has no text yet."""
        return {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }


def served_model(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What the server says of its first model: `id`, and `max_model_len` where it tells.

    Raises:
        ConnectionError: there is no such server, or it does not say.
    """

    async def ask() -> dict[str, Any]:
        target = Target(url=url, model="", api_key=api_key, seconds=ASK_SECONDS)
        async with _session(target) as session, session.get(f"{url}/v1/models") as response:
            response.raise_for_status()
            return (await response.json())["data"][0]

    try:
        return asyncio.run(ask())
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        raise ConnectionError(f"{url}/v1/models does not name a model: {error or type(error)}") from None


def send_all(
    target: Target,
    requests: Sequence[Planned],
    *,
    concurrency: int | None = None,
    done: Callable[[Record], None] = lambda record: None,
) -> tuple[list[Record], float]:
    """Send every request when it arrives; the records in the order of the requests, and the seconds it took.

    Args:
        concurrency: most requests at a time; one that has to wait for its turn has not been sent yet.
        done: called with each record as its request ends.
    """
    return asyncio.run(_send_all(target, requests, concurrency or len(requests), done))


async def _send_all(
    target: Target, requests: Sequence[Planned], concurrency: int, done: Callable[[Record], None]
) -> tuple[list[Record], float]:
    turns = asyncio.Semaphore(concurrency)
    async with _session(target) as session:
        began = time.perf_counter()

        async def send(request: Planned) -> Record:
            await asyncio.sleep(began + request.at - time.perf_counter())
            async with turns:
                record = await _send(session, target, request, began)
            done(record)
            return record

        records = await asyncio.gather(*map(send, requests))
        return records, time.perf_counter() - began


def _session(target: Target) -> aiohttp.ClientSession:
    """One connection for each request that runs."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=target.headers,
        timeout=aiohttp.ClientTimeout(total=target.seconds),
    )


async def _send(session: aiohttp.ClientSession, target: Target, request: Planned, began: float) -> Record:
    sent = time.perf_counter()
    record = Record(sent=sent - began, prompt_tokens=len(request.prompt))
    try:
        async with session.post(f"{target.url}/v1/completions", json=target.body(request)) as response:
            if response.status == 200:
                record.error = await _read(response, record, sent)
            else:
                record.error = f"HTTP {response.status}{await _code(response)}"
    except TimeoutError:
        record.error = f"took longer than {target.seconds:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        record.error = type(error).__name__
    return record


async def _read(response: aiohttp.ClientResponse, record: Record, sent: float) -> str | None:
    """Note every event of a stream; what it failed with."""
    async for event in _events(response.content):
        if event == b"[DONE]":
            return None
        body = json.loads(event)
        if "error" in body:
            return f"error event: {body['error'].get('code') or body['error'].get('type')}"
        if body.get("usage"):
            record.usage = body["usage"]["completion_tokens"]
        if count := sum(map(_tokens, body["choices"])):
            record.arrivals.append(time.perf_counter() - sent)
            record.counts.append(count)
    return UNFINISHED


def _tokens(choice: dict[str, Any]) -> int:
    """Of one event; a server that does not tell its token ids is taken to send each token by itself."""
    ids = choice.get("token_ids")
    return bool(choice.get("text")) if ids is None else len(ids)


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events, each of one line."""
    rest = b""
    async for received in stream.iter_any():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _code(response: aiohttp.ClientResponse) -> str:
    """Of an error in OpenAI's shape, if it is one."""
    with suppress(ValueError, LookupError, TypeError):
        return f" {json.loads(await response.text())['error']['code'] or ''}".rstrip()
    return ""
