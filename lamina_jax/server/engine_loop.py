"""Builds an engine and runs it, told what to do by messages on a socket.

It owns the engine alone: what others know of it, they know from the events that it sends. It knows nothing
of HTTP or asyncio, nor whether those at the other end are in another process.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from lamina_jax.config import CheckpointError, ConfigError
from lamina_jax.core import QueueFull, WorkerLost
from lamina_jax.engine.engine import Engine
from lamina_jax.server import messages
from lamina_jax.server.frames import MESSAGES, FrameError, pack, receive
from lamina_jax.server.messages import Event, Message, request_id

LISTENER_SECONDS = 1.0
"""What the thread that listens may take to end once the socket is shut down."""

BEAT_SECONDS = 1.0
"""Between two words that this process is alive: a thread says them, for a step may take longer."""

log = logging.getLogger(__name__)

Build = Callable[[Callable[[str, int, int], None]], Engine]
"""`build(report)` makes the engine, and calls `report(phase, done, total)` on the way."""

EXPLAINED = (ConfigError, CheckpointError, WorkerLost)
"""Errors that say what to change."""


class _Left(Exception):
    """Nobody is at the other end any more."""


class EngineLoop:
    """Builds an engine, then steps it while it has work and sleeps, open to messages, while it has none.

    Args:
        build: an error that its user can mend (`EXPLAINED`) is reported by its message alone.
        connection: a stream socket, blocking; closed at the end. The last event on it is `Died`, unless
            `Stop` came.
        left: called, in a thread of its own, when the other end is closed or cannot be understood, before
            the loop gets to know of it.
    """

    def __init__(
        self, build: Build, connection: socket.socket, left: Callable[[], None] = lambda: None
    ) -> None:
        self._build, self._connection, self._left = build, connection, left
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._over, self._speaking = threading.Event(), threading.Lock()

    def run(self) -> None:
        """Until `Stop` comes, the engine fails, or nobody is at the other end any more."""
        listener = threading.Thread(target=self._listen, name="engine listener", daemon=True)
        listener.start()
        threading.Thread(target=self._beat, name="engine heartbeat", daemon=True).start()
        try:
            self._live()
        except _Left:
            pass
        finally:
            self._over.set()
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            listener.join(LISTENER_SECONDS)
            self._connection.close()

    def _live(self) -> None:
        try:
            engine = self._build(self._report)
            self._emit(messages.Ready(engine.stats()))
            self._serve(engine)
            engine.close()
        except _Left:
            raise
        except EXPLAINED as error:
            self._emit(messages.Died(str(error)))
        except BaseException as error:  # whatever it is, those who wait for answers must hear of it
            log.exception("the engine has died")
            self._emit(messages.Died(f"{type(error).__name__}: {error}"))

    def fail(self, reason: str) -> None:
        """Say `Died` now, from any thread, whatever the engine does; its process is about to end."""
        with suppress(_Left):
            self._emit(messages.Died(reason))

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(receive(self._connection, MESSAGES))
        except FrameError as error:
            log.error("the server sent what cannot be read: %s", error)
        except (EOFError, OSError):
            pass
        if not self._over.is_set():
            self._left()
            self._over.set()
            self._inbox.put(messages.Stop())

    def _beat(self) -> None:
        with suppress(_Left):
            while not self._over.wait(BEAT_SECONDS):
                self._emit(messages.Alive())

    def _emit(self, event: Event) -> None:
        try:
            with self._speaking:
                self._connection.sendall(pack(event))
        except OSError:
            raise _Left from None

    def _report(self, phase: str, done: int, total: int) -> None:
        if self._over.is_set():
            raise _Left
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
        requests = [
            engine.request(request_id(call.call_id, index), prompt, call.sampling)
            for index, prompt in enumerate(call.prompts)
        ]
        try:
            engine.submit(*requests)
        except (QueueFull, ValueError) as error:
            self._emit(messages.Rejected(call.call_id, str(error), isinstance(error, QueueFull)))
        else:
            self._emit(messages.Accepted(call.call_id))


def _loss(engine: Engine) -> messages.Lost | None:
    lost = engine.lost
    return None if lost is None else messages.Lost(lost.worker, lost.reason)
