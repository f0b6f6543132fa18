"""A server's life: it starts, says how far it is, serves, drains and ends with an exit code.

It puts the web server, the service and the link to the engine together. Nothing in it waits without an end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from rich.console import Console

from lamina_jax.command import SAME_SIGNAL_SECONDS, SIGNALS
from lamina_jax.config import CheckpointError, ServerConfig
from lamina_jax.server.app import create_app
from lamina_jax.server.engine_host import EngineHost
from lamina_jax.server.engine_link import EngineLink
from lamina_jax.server.listener import url
from lamina_jax.server.messages import Died, Event, Lost, Progress, Ready, Recovered
from lamina_jax.server.report import StartReport
from lamina_jax.server.service import Service
from lamina_jax.weights.tokenizer import Tokenizer

GOODBYE_SECONDS = 2
"""What the last answers get to reach their clients."""

FAILED_SECONDS = 1.0
"""For which a server whose engine has died says so on `/ready`."""

ENGINE_SECONDS = 5.0
"""What an engine gets to give back what it holds, before it is killed."""

log = logging.getLogger(__name__)


class _WebServer(uvicorn.Server):
    """uvicorn, which leaves the signals alone: calls end before it does."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One model behind one listener.

    Args:
        host: where the engine runs, which has been started.
        tokenizer: loads the checkpoint's; called in a thread.
        model: the name under which it is served.
        config: the host and port are the listener's by now.
        keys: the digests of config.api_key_file.
    """

    def __init__(
        self,
        host: EngineHost,
        tokenizer: Callable[[], Tokenizer | None],
        model: str,
        config: ServerConfig,
        keys: tuple[bytes, ...] = (),
    ) -> None:
        self._config, self._load_tokenizer, self._keys = config, tokenizer, keys
        self._link = EngineLink(host)
        self._service = Service(model, self._link.send, request_seconds=config.request_seconds)
        self._report = StartReport(Console(stderr=True) if config.log_format == "text" else None)
        self._over = asyncio.Event()
        self._url = ""

    async def run(self, listener: socket.socket) -> int:
        """Serve until a signal comes or the engine dies; the exit code. Call it once."""
        self._url = url(listener)
        self._report.line(f"listening on {self._url}, loading {self._service.model}")
        await self._link.open()
        web = _WebServer(
            uvicorn.Config(
                create_app(self._service, self._keys),
                access_log=False,
                lifespan="off",
                log_config=None,
                timeout_graceful_shutdown=GOODBYE_SECONDS,
                ws="none",
            )
        )
        self._take_signals()
        following = asyncio.create_task(self._follow())
        serving = asyncio.create_task(web.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: self._over.set())
        await self._over.wait()
        self._report.close()
        await self._drain()
        web.should_exit = True
        await serving
        for connection in list(web.server_state.connections):  # of clients that do not read
            connection.transport.abort()
        following.cancel()
        ready = self._service.facts is not None and self._service.error is None
        await self._link.close(ENGINE_SECONDS if ready else 0.0)
        return 0 if self._service.error is None else 1

    def stop(self) -> None:
        """Drain and end; on the event loop, or before it runs."""
        if not self._over.is_set():
            self._report.line("ending; a second signal ends at once")
            self._over.set()

    async def _drain(self) -> None:
        if self._service.error is None:
            await self._service.drain(self._config.drain_seconds)
            return
        if self._service.facts is not None:  # whoever asked it for answers may ask what became of it
            await asyncio.sleep(FAILED_SECONDS)
        await self._service.drain(GOODBYE_SECONDS)

    def _take_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in SIGNALS:
                loop.add_signal_handler(number, self._take_signal, loop)

    def _take_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first begins the end. The second is left to the kernel: the engine does not outlive us."""
        self.stop()
        loop.call_later(SAME_SIGNAL_SECONDS, _default_signals, loop)

    async def _follow(self) -> None:
        """Take what the engine says, until it has died."""
        loading = asyncio.create_task(self._load())
        try:
            async for event in self._link.events():
                if isinstance(event, Ready):
                    await loading
                self._take(event)
        except Exception as error:
            log.exception("the server cannot follow its engine")
            self._take(Died(f"the server cannot follow it: {type(error).__name__}: {error}"))

    async def _load(self) -> None:
        try:
            self._service.tokenizer = await asyncio.to_thread(self._load_tokenizer)
        except CheckpointError as error:
            self._take(Died(str(error)))

    def _take(self, event: Event) -> None:
        if self._service.error is not None:  # the first reason is the one
            return
        self._service.take(event)
        match event:
            case Progress(phase, done, total):
                self._report.progress(phase, done, total)
            case Ready(stats):
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


def _default_signals(loop: asyncio.AbstractEventLoop) -> None:
    for number in SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
