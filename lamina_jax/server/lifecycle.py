"""A server's life: it starts, says how far it is, serves, drains and ends with an exit code.

It puts the web server, the service and the engine's thread together. Nothing in it waits without an end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from rich.console import Console

from lamina_jax.config import ServerConfig
from lamina_jax.server.app import create_app
from lamina_jax.server.engine_thread import Build, EngineThread
from lamina_jax.server.listener import url
from lamina_jax.server.messages import Died, Event, Lost, Progress, Ready, Recovered
from lamina_jax.server.report import StartReport
from lamina_jax.server.service import Service

GOODBYE_SECONDS = 2
"""What the last answers get to reach their clients."""

JOIN_SECONDS = 0.3
"""What the engine's thread gets to end after it was told to."""


class _WebServer(uvicorn.Server):
    """uvicorn, which leaves the signals alone: the engine has to hear of them first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One model behind one listener.

    Args:
        build: makes the engine; see `engine_thread`.
        model: the name under which it is served.
        config: the host and port are the listener's by now.
    """

    def __init__(self, build: Build, model: str, config: ServerConfig) -> None:
        self._config = config
        self._engine = EngineThread(build, self._emit)
        self._service = Service(model, self._engine.send, request_seconds=config.request_seconds)
        self._report = StartReport(Console(stderr=True))
        self._over = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._url = ""

    async def run(self, listener: socket.socket) -> int:
        """Serve until a signal comes or the engine dies; the exit code. Call it once."""
        self._loop, self._url = asyncio.get_running_loop(), url(listener)
        self._report.line(f"listening on {self._url}, loading {self._service.model}")
        web = _WebServer(
            uvicorn.Config(
                create_app(self._service),
                access_log=False,
                lifespan="off",
                log_config=None,
                timeout_graceful_shutdown=GOODBYE_SECONDS,
                ws="none",
            )
        )
        self._take_signals()
        self._engine.start()
        serving = asyncio.create_task(web.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: self._over.set())
        await self._over.wait()
        self._report.close()
        await self._service.drain(self._config.drain_seconds)
        web.should_exit = True
        await serving
        self._engine.stop()
        return 0 if self._service.error is None else 1

    def stop(self) -> None:
        """Drain and end; from any thread. The second time: end at once."""
        if self._over.is_set():
            leave(1)
        self._report.line("ending; a second signal ends at once")
        self._loop.call_soon_threadsafe(self._over.set)

    @property
    def ending(self) -> bool:
        """Whether it was told to stop, or its engine has died."""
        return self._over.is_set()

    @property
    def ended_cleanly(self) -> bool:
        """Whether no thread of the engine is left; threads that compile outlive a start that failed."""
        self._engine.join(JOIN_SECONDS)
        return self._service.facts is not None and not self._engine.is_alive()

    def _take_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self.stop)

    def _emit(self, event: Event) -> None:
        """In the engine's thread. Once the loop has closed there is nobody left to tell."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        self._service.take(event)
        match event:
            case Progress(phase, done, total):
                self._report.progress(phase, done, total)
            case Ready(stats, _):
                self._report.close()
                facts = f"{self._service.model}, {stats['placement']}, {stats['pages_total']} pages"
                self._report.line(f"ready: {self._url} ({facts}) in {self._service.elapsed_seconds:.1f} s")
            case Lost(worker, reason):
                self._report.line(f"not ready: attention worker {worker} is lost: {reason}")
            case Recovered():
                self._report.line(f"ready: {self._url}")
            case Died(reason):
                self._report.close()
                self._report.line(f"error: {reason}")
                self._over.set()


def leave(code: int) -> None:
    """End the process now, whatever its threads do.

    Python waits at its end for every thread of a pool, and one that compiles a program cannot be
    interrupted.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
