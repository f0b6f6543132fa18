"""The thread that builds the engine and runs it, told what to do by messages.

It owns the engine alone: what others know of it, they know from the events that it emits. It knows
nothing of HTTP or asyncio.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from lamina_jax.core import Request, RequestOutput, SamplingParams, WorkerLost
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.server import messages
from lamina_jax.server.messages import Event, Message, request_id
from lamina_jax.weights.tokenizer import Tokenizer, texts_of_tokens

log = logging.getLogger(__name__)


@runtime_checkable
class Engine(Protocol):
    """What is used of `lamina_jax.engine.engine.Engine`, without importing jax before the port answers."""

    scheduler: Scheduler
    tokenizer: Tokenizer | None

    def request(self, request_id: str, prompt: str | Sequence[int], sampling: SamplingParams) -> Request: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> RequestOutput | None: ...

    @property
    def lost(self) -> WorkerLost | None: ...

    @property
    def pause(self) -> float | None: ...

    def step(self) -> list[RequestOutput]: ...

    def stats(self) -> dict[str, Any]: ...


Build = Callable[[Callable[[str, int, int], None]], Engine]
"""`build(report)` makes the engine, and calls `report(phase, done, total)` on the way."""


class StartError(Exception):
    """The engine cannot start for a reason that its user can change; the message says which."""


class _Stopped(Exception):
    """`stop` was called while the engine was being built."""


class EngineThread(threading.Thread):
    """Builds an engine, then steps it while it has work and sleeps, open to messages, while it has none.

    Args:
        build: called in this thread; a `StartError` is reported by its message alone.
        emit: called in this thread with events, in order; must not block. The last of them is `Died`,
            unless `stop` was called.
    """

    def __init__(self, build: Build, emit: Callable[[Event], None]) -> None:
        super().__init__(name="engine", daemon=True)
        self._build, self._emit = build, emit
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._stopping = threading.Event()

    def send(self, message: Message) -> None:
        """Give the engine a message; from any thread."""
        self._inbox.put(message)

    def stop(self) -> None:
        """End the thread after its current step, or at the next report of `build`."""
        self._stopping.set()
        self.send(messages.Stop())

    def run(self) -> None:
        try:
            engine = self._build(self._report)
            template = engine.tokenizer.chat_template if engine.tokenizer is not None else None
            self._emit(messages.Ready(engine.stats(), template))
            self._serve(engine)
        except _Stopped:
            pass
        except StartError as error:
            self._emit(messages.Died(str(error)))
        except BaseException as error:  # whatever it is, those who wait for answers must hear of it
            log.exception("the engine has died")
            self._emit(messages.Died(f"{type(error).__name__}: {error}"))

    def _report(self, phase: str, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._emit(messages.Progress(phase, done, total))

    def _serve(self, engine: Engine) -> None:
        told: messages.Lost | None = None
        while True:
            for message in self._received(engine.pause):
                match message:
                    case messages.Submit():
                        self._submit(engine, message)
                    case messages.Abort(call_id, count):
                        for index in range(count):
                            engine.abort(request_id(call_id, index))
                    case messages.AskStats():
                        self._emit(messages.Stats(engine.stats()))
                    case messages.Stop():
                        return
            outputs = engine.step()
            if (loss := _loss(engine)) != told:
                self._emit(loss or messages.Recovered())
                told = loss
            if outputs:
                self._emit(messages.Outputs(outputs))

    def _received(self, pause: float | None) -> list[Message]:
        """The messages that are there; waits so many seconds for the first one, None: as long as it takes."""
        received: list[Message] = []
        with suppress(queue.Empty):
            while True:
                received.append(self._inbox.get(timeout=0 if received else pause))
        return received

    def _submit(self, engine: Engine, call: messages.Submit) -> None:
        submitted: list[str] = []
        echo: list[list[str]] = []
        request: Request | None = None
        try:
            for index, prompt in enumerate(_as_submitted(call, engine.tokenizer)):
                request = engine.request(request_id(call.call_id, index), prompt, call.sampling)
                engine.submit(request)
                submitted.append(request.request_id)
                if call.echo:
                    echo.append(texts_of_tokens(engine.tokenizer, request.prompt_token_ids))
        except (ValueError, TypeError) as error:
            for submitted_id in submitted:
                engine.abort(submitted_id)
            longest = engine.scheduler.config.max_model_len - 1
            too_long = request is not None and len(request.prompt_token_ids) > longest
            self._emit(messages.Rejected(call.call_id, str(error), too_long))
        else:
            self._emit(messages.Accepted(call.call_id, echo))


def _loss(engine: Engine) -> messages.Lost | None:
    lost = engine.lost
    return None if lost is None else messages.Lost(lost.worker, lost.reason)


def _as_submitted(call: messages.Submit, tokenizer: Tokenizer | None) -> list[messages.Prompt]:
    """The prompts as the engine takes them: it encodes a text with the tokenizer's special tokens."""
    if call.special_tokens or tokenizer is None:
        return call.prompts
    return [
        tokenizer.encode(prompt, special_tokens=False) if isinstance(prompt, str) else prompt
        for prompt in call.prompts
    ]
