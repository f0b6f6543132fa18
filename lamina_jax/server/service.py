"""The server's side of the engine: how far it is, and the calls that it works on.

Everything here lives on one event loop; the engine is reached by messages alone. Knows nothing of HTTP
beyond the errors that it answers with.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from lamina_jax.core import SamplingParams, WorkerLost
from lamina_jax.server import messages
from lamina_jax.server.call import Call
from lamina_jax.server.call_meter import CallMeter
from lamina_jax.server.errors import RETRY_AFTER, ApiError
from lamina_jax.server.frames import FrameError
from lamina_jax.server.metrics import ServerMetrics
from lamina_jax.server.prompts import Prompt
from lamina_jax.server.request_log import RequestRecord
from lamina_jax.weights.tokenizer import Tokenizer

STATS_SECONDS = 10.0
"""How long a step may take before `stats` gives up; the engine answers between two steps."""

SILENT_SECONDS = 5.0
"""For which nothing is heard of an engine's process that is stopped, or gets no processor time."""


class Service:
    """What the routes ask.

    Args:
        model: the name under which the model is served.
        send: gives the engine a message.
        request_seconds: longest time that an HTTP request may take.

    Attributes:
        request_seconds: as given.
        tokenizer: the checkpoint's, once the engine is ready, if it has one.
        metrics: what Prometheus is told.
    """

    def __init__(
        self, model: str, send: Callable[[messages.Message], None], *, request_seconds: float
    ) -> None:
        self.model, self.created = model, int(time.time())
        self.progress = messages.Progress("starting", 0, 0)
        self.facts: dict[str, Any] | None = None
        self.tokenizer: Tokenizer | None = None
        self.error: str | None = None
        self.lost: messages.Lost | None = None
        self.draining = False
        self._send, self.request_seconds = send, request_seconds
        self._started = self._heard = time.monotonic()
        self._calls: dict[str, Call] = {}
        self.metrics = ServerMetrics(model)
        self._stats_asked: asyncio.Future[dict[str, Any]] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def phase(self) -> str:
        """Of the start, and then "ready", "engine_silent", "worker_lost", "draining" or "failed"."""
        if self.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        if self.facts is None:
            return self.progress.phase
        if self.silent_seconds > SILENT_SECONDS:
            return "engine_silent"
        return "ready" if self.lost is None else "worker_lost"

    @property
    def silent_seconds(self) -> float:
        """Since when nothing has been heard of the engine's process."""
        return time.monotonic() - self._heard

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def status(self) -> dict[str, Any]:
        """How far the server is, for `/ready`."""
        status = {
            "phase": self.phase,
            "done": self.progress.done,
            "total": self.progress.total,
            "elapsed_s": round(self.elapsed_seconds, 3),
        }
        if self.lost is not None:
            status |= {"worker": self.lost.worker, "reason": self.lost.reason}
        if self.phase == "engine_silent":
            status["silent_s"] = round(self.silent_seconds, 3)
        return status if self.error is None else status | {"error": self.error}

    def require_ready(self) -> dict[str, Any]:
        """What is known of the engine. Raises `ApiError` (503) while it takes no calls.

        It takes them while a worker is lost, or the engine silent: they wait.
        """
        if self.facts is None or self.phase not in ("ready", "worker_lost", "engine_silent"):
            why = "/ready tells when" if self.error is None else self.error
            message = f"not ready: {self.phase} after {self.elapsed_seconds:.0f} s; {why}"
            raise ApiError(503, message, code="not_ready", headers=RETRY_AFTER)
        return self.facts

    def open(
        self,
        prefix: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        record: RequestRecord,
        *,
        param_of: Callable[[str], str],
    ) -> Call:
        """Submit a call, whose id begins with `prefix`. Whoever opens it closes it.

        `record` is that of its HTTP request.

        Raises:
            ApiError: the engine takes no calls (503), or this one cannot be told to it (400).
        """
        self.require_ready()
        call_id, lengths = f"{prefix}-{uuid.uuid4().hex}", [len(prompt.token_ids) for prompt in prompts]
        meter = CallMeter(self.metrics, record, call_id, lengths, sampling.n)
        call = Call(call_id, len(prompts), self.deadline(record), self.late, param_of, meter)
        try:
            self._send(messages.Submit(call.id, [prompt.token_ids for prompt in prompts], sampling))
        except FrameError as error:
            raise ApiError(400, f"this request {error}") from None
        self._calls[call.id] = call
        self._idle.clear()
        return call

    def deadline(self, record: RequestRecord) -> float:
        """When an HTTP request must be over, in the event loop's time, which is `time.monotonic()`."""
        return record.began + self.request_seconds

    def late(self) -> ApiError:
        """What it ends with then."""
        late = "the request took longer than request_seconds allows"
        if self.lost is None:
            return ApiError(504, late, code="timeout")
        return _worker_lost(f"{late}: {WorkerLost(self.lost.worker, self.lost.reason)}")

    def close(self, call: Call) -> None:
        """Forget a call; what still runs of it is aborted, and gives its pages back."""
        if self._calls.pop(call.id, None) is None:
            return
        call.close()
        self._send(messages.Abort(call.id, call.count))
        if not self._calls:
            self._idle.set()

    async def stats(self, seconds: float = STATS_SECONDS) -> dict[str, Any]:
        """The engine's counters. Raises `ApiError` if it does not answer within so many seconds."""
        if self.error is not None:
            raise _dead(self.error)
        if self._stats_asked is None:  # one question at a time, whoever asks: an engine may hang for long
            self._stats_asked = asyncio.get_running_loop().create_future()
            self._send(messages.AskStats())
        try:
            return await asyncio.wait_for(asyncio.shield(self._stats_asked), seconds)
        except TimeoutError:
            message = f"the engine has not answered for {seconds:g} s"
            raise ApiError(504, message, code="timeout") from None

    async def drain(self, seconds: float) -> None:
        """Take no new calls, give those that run some time to end, then end them with an error."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._fail_calls(ApiError(503, "the server is shutting down", code="shutting_down"))

    def take(self, event: messages.Event) -> None:
        """Bring an event of the engine to those that it concerns. A call that has gone is passed over."""
        self._heard = time.monotonic()
        match event:
            case messages.Progress():
                self.progress = event
            case messages.Ready(stats):
                self.facts = self.metrics.engine = stats
            case messages.Died(reason):
                self.error = reason
                self._fail_calls(_dead(reason))
                if self._stats_asked is not None:
                    self._stats_asked.set_exception(_dead(reason))
                    self._stats_asked.exception()  # nobody may be waiting any more
            case messages.Lost():
                self.lost, self.metrics.worker_lost = event, True
            case messages.Recovered():
                self.lost, self.metrics.worker_lost = None, False
            case messages.Accepted(call_id) if call := self._calls.get(call_id):
                call.accept()
            case messages.Rejected(call_id, reason, queue_full) if call := self._calls.get(call_id):
                if queue_full:
                    call.fail(ApiError(429, reason, code="queue_full", headers=RETRY_AFTER))
                else:
                    call.fail(ApiError(400, reason, param=call.param_of(reason)))
            case messages.Outputs(outputs):
                for news in outputs:
                    call_id, index = messages.call_and_index(news.request_id)
                    if not (call := self._calls.get(call_id)):
                        continue
                    if news.error is None:
                        call.put(index, news)
                    else:
                        call.fail(_worker_lost(news.error))
            case messages.Stats(values):
                self.metrics.engine = values
                if self._stats_asked is not None:
                    self._stats_asked.set_result(values)
                    self._stats_asked = None

    def _fail_calls(self, error: ApiError) -> None:
        for call in self._calls.values():
            call.fail(error)


def _dead(reason: str) -> ApiError:
    return ApiError(500, f"the engine has died: {reason}", code="engine_died")


def _worker_lost(message: str) -> ApiError:
    return ApiError(503, message, code="worker_lost", headers=RETRY_AFTER)
