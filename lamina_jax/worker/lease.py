"""One engine's hold on the worker: its session, how far that is, its one data stream, and its end.

Knows nothing of gRPC or sockets, nor of other leases.
"""

from __future__ import annotations

import gc
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np

from lamina_jax.compilation import Footprint, Job, compile_all
from lamina_jax.config import ConfigError
from lamina_jax.exchange.channel import ChannelClosed, Frame
from lamina_jax.exchange.control_messages import LeaseEvent, Progress, Ready
from lamina_jax.exchange.frames import HEADER_BYTES, Header, ProtocolError
from lamina_jax.exchange.pull import PullOrder
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.pull import Dial, Pulls

log = logging.getLogger(__name__)

SESSION_ID_BYTES = 16


@runtime_checkable
class Session(Protocol):
    """The memory side of one lease; see `lamina_jax.worker.session`."""

    geometry: CacheGeometry
    transfer_address: str

    @property
    def footprint(self) -> Footprint: ...
    def probe(self) -> Iterable[Job]: ...
    def jobs(self) -> Iterable[Job]: ...
    def hold(self) -> None: ...
    def room(self, header: Header) -> int: ...
    def hang_up(self) -> None: ...
    def is_settled(self, step: int, seconds: float) -> bool: ...
    def keep_pulled(self, layer: int, slots: np.ndarray, payload: np.ndarray, tokens: int) -> None: ...
    def answers(self, frames: Iterable[Frame]) -> Iterator[tuple[Header, list[np.ndarray]]]: ...


class Refused(Exception):
    """The worker, or a data stream, is not to be had; the text says why."""


class _Over(Exception):
    """The lease ended while it was being prepared."""


class Lease:
    """One engine's hold on the worker.

    Attributes:
        session_id: what a data stream must show.
        spec: what it asks for.
        page_bytes: what all of its pages fill.
        group: of the engines that share the worker with this one.
        pulls: of KV from prefill hosts, which end with it.
        reason: why it is over.
    """

    def __init__(
        self,
        engine: str,
        make_session: Callable[[], Session],
        spec: WorkerSpec,
        traffic: Traffic,
        group: str = "",
    ) -> None:
        self.engine, self.spec, self.group, self.reason = engine, spec, group, ""
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self.over, self.pulls = threading.Event(), Pulls()
        self.page_bytes = spec.geometry.num_pages * spec.geometry.bytes_per_page
        self._make_session, self._traffic = make_session, traffic
        self._session: Session | None = None
        self._events: queue.SimpleQueue[LeaseEvent | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._hang_up: Callable[[], None] | None = None

    def events(self) -> Iterator[LeaseEvent]:
        """How far it is; ends when the lease is over."""
        return iter(self._events.get, None)

    def end(self, reason: str) -> None:
        """The lease is over, its data stream with it; from any thread, the first reason counts."""
        with self._changed:
            if self.over.is_set():
                return
            self.reason = reason
            self.over.set()
            hang_up, session = self._hang_up, self._session
        self.pulls.close()
        self._events.put(None)
        if hang_up is not None:
            hang_up()
        if session is not None:
            session.hang_up()

    def run(self) -> None:
        """Prepare, wait for the end, give everything back; in a thread of its own."""
        try:
            session = self._make_session()
            log.info("%s", compile_all(session.jobs(), self._progress))
            session.hold()
            self._session, address = session, session.transfer_address
            del session
            self._events.put(Ready(self.session_id, self.spec.geometry.num_pages, address))
            self.over.wait()
        except _Over:
            pass
        except Exception as error:
            log.debug("lease of %s", self.engine, exc_info=True)
            self.end(f"cannot prepare what the lease asks for: {first_line(error)}")
        self.pulls.join()
        with self._changed:
            self._changed.wait_for(lambda: self._hang_up is None)
            self._session = None
        gc.collect()  # pages may hang in a cycle

    @contextmanager
    def stream(self, hang_up: Callable[[], None]) -> Iterator[Session]:
        """The session, for its one data stream; the lease ends with it.

        Args:
            hang_up: wakes the stream when the lease is over.

        Raises:
            Refused: there is a stream already, or no session.
        """
        with self._changed:
            if self._session is None or self.over.is_set():
                raise Refused("the lease is not ready, or over")
            if self._hang_up is not None:
                raise Refused("the session has a data stream already")
            self._hang_up = hang_up
        reason = "the data stream has ended"
        try:
            yield self._session
        except ChannelClosed as error:
            reason = f"the data stream has ended: {error}"
        except Exception as error:
            reason = f"the worker gave up: {first_line(error)}"
            raise
        finally:
            with self._changed:
                self._hang_up = None
                self._changed.notify_all()
            self.end(reason)

    def answers(self, session: Session, frames: Iterable[Frame]) -> Iterator[tuple[Header, list[np.ndarray]]]:
        """`session.answers`, counted."""
        for header, buffers in session.answers(self._traffic.received(frames)):
            self._traffic.sent(header)
            yield header, buffers

    def pull(self, order: PullOrder, dial: Dial) -> int:
        """Pull KV into the session's pages; bytes of tensors. See `Pulls.run`.

        Raises:
            Refused: there is no session.
        """
        session = self._session
        if session is None:
            raise Refused("the lease is not ready, or over")
        try:
            return self.pulls.run(order, session, dial)
        except (ChannelClosed, ProtocolError, ConfigError):
            raise
        except Exception as error:
            self.end(f"the worker gave up at a pull: {first_line(error)}")
            raise

    def _progress(self, done: int, total: int) -> None:
        if self.over.is_set():
            raise _Over
        self._events.put(Progress(done, total))


class Traffic:
    """Frames and bytes that crossed, headers included, since the worker started."""

    def __init__(self) -> None:
        self.frames_received = self.bytes_received = self.frames_sent = self.bytes_sent = 0

    def received(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Count frames as they pass."""
        for frame in frames:
            self.frames_received += 1
            self.bytes_received += HEADER_BYTES + frame.header.length
            yield frame

    def sent(self, header: Header) -> None:
        """Count one frame."""
        self.frames_sent += 1
        self.bytes_sent += HEADER_BYTES + header.length


def first_line(error: BaseException) -> str:
    """What a caller far away is told of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
