"""Gives the worker to one engine at a time. Knows nothing of gRPC or sockets."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable

from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.lease import Lease, Refused, Session, Traffic

log = logging.getLogger(__name__)

TAKE_SECONDS = 3.0
"""How long an engine waits for the one before to be gone: it may be its own shadow, restarted."""


class Leases:
    """Gives the worker out to one engine at a time.

    Args:
        make_session: the memory side for a spec.

    Attributes:
        lease: the one there is.
    """

    def __init__(self, make_session: Callable[[WorkerSpec], Session]) -> None:
        self._make_session = make_session
        self._changed = threading.Condition()
        self.lease: Lease | None = None
        self._draining = False
        self.traffic = Traffic()

    def take(self, engine: str, spec: WorkerSpec) -> Lease:
        """A lease whose thread runs.

        Raises:
            Refused: another engine has the worker, or it is shutting down.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.lease is None or self._draining, TAKE_SECONDS)
            if self._draining:
                raise Refused("it is shutting down")
            if (held := self.lease) is not None:
                gone = ", which has gone; its last program still runs" if held.over.is_set() else ""
                raise Refused(
                    f"held by another engine, {held.engine}{gone}: end that one, or take another worker"
                )
            lease = Lease(engine, lambda: self._make_session(spec), spec.geometry.num_pages, self.traffic)
            self.lease = lease
        threading.Thread(target=self._run, args=(lease,), name="lease", daemon=True).start()
        return lease

    def find(self, session_id: bytes) -> Lease:
        """The lease that `session_id` opens a data stream of.

        Raises:
            Refused: there is none.
        """
        lease = self.lease
        if lease is None or not hmac.compare_digest(lease.session_id, session_id):
            raise Refused("no lease has this session id")
        return lease

    def drain(self, seconds: float) -> None:
        """Give out no more leases, and wait for the engine that has one to leave; then end its lease."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self.lease is None, seconds) and self.lease is not None:
                self.lease.end("the worker is shutting down")

    def _run(self, lease: Lease) -> None:
        log.info("leased to %s", lease.engine)
        try:
            lease.run()
        finally:
            with self._changed:
                self.lease = None
                self._changed.notify_all()
            log.info("free again: %s", lease.reason)
