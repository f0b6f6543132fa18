"""Gives the worker to one engine at a time, or to one group of them. Knows nothing of gRPC or sockets."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable

from lamina_jax.compilation import Footprint, compile_all
from lamina_jax.config import ConfigError
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.lease import Lease, Refused, Session, Traffic

log = logging.getLogger(__name__)

TAKE_SECONDS = 3.0
"""How long an engine waits for the one before to be gone: it may be its own shadow, restarted."""


class Leases:
    """Gives the worker out: to one engine at a time, or to the compute hosts of one, which are a group.

    Args:
        make_session: the memory side for a spec.

    Attributes:
        held: the leases that there are, all of one group.
    """

    def __init__(self, make_session: Callable[[WorkerSpec], Session]) -> None:
        self._make_session = make_session
        self._changed, self._measuring = threading.Condition(), threading.Lock()
        self.held: tuple[Lease, ...] = ()
        self._draining = False
        self.traffic = Traffic()

    def take(self, engine: str, spec: WorkerSpec, memory_bytes: int, group: str = "") -> Lease:
        """A lease whose thread runs.

        Args:
            memory_bytes: that the pages of all leases may fill.
            group: of whose engines the others may have leases, too; empty: nobody may.

        Raises:
            Refused: another engine has the worker, or it is shutting down.
            ConfigError: the pages do not fit.
        """
        wanted = spec.geometry
        with self._changed:
            self._wait_free(group)
            filled = sum(lease.page_bytes for lease in self.held)
            if filled + wanted.num_pages * wanted.bytes_per_page > memory_bytes:
                raise ConfigError(_no_room(wanted, filled, memory_bytes))
            lease = Lease(engine, lambda: self._make_session(spec), spec, self.traffic, group)
            self.held += (lease,)
        threading.Thread(target=self._run, args=(lease,), name="lease", daemon=True).start()
        return lease

    def measure(self, spec: WorkerSpec, group: str = "") -> Footprint:
        """What the programs of such a lease need on each device, beside its pages; returns once the largest
        is compiled.

        Args:
            group: as for `take`: others of it may have leases already.

        Raises:
            Refused: an engine has the worker, or it is shutting down.
        """
        with self._measuring:
            with self._changed:
                self._wait_free(group)
            session = self._make_session(spec)
            compile_all(session.probe(), lambda done, total: None)
            return session.footprint

    def find(self, session_id: bytes) -> Lease:
        """The lease that `session_id` opens a data stream of.

        Raises:
            Refused: there is none.
        """
        for lease in self.held:
            if hmac.compare_digest(lease.session_id, session_id):
                return lease
        raise Refused("no lease has this session id")

    def holding(self, group: str, kv_start: int) -> Lease:
        """The lease of a group that has the KV heads from `kv_start` on.

        Raises:
            Refused: there is none.
        """
        for lease in self.held:
            its_group = hmac.compare_digest(lease.group.encode(), group.encode())
            if group and its_group and lease.spec.kv_start == kv_start and not lease.over.is_set():
                return lease
        raise Refused(f"no lease of this group has the KV heads from {kv_start} on")

    def drain(self, seconds: float) -> None:
        """Give out no more leases, and wait for the engine that has one to leave; then end its lease."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.held, seconds)
            for lease in self.held:
                lease.end("the worker is shutting down")

    def _wait_free(self, group: str) -> None:
        """Returns when nobody of another group has the worker; raises `Refused`."""
        self._changed.wait_for(lambda: self._draining or self._free_for(group), TAKE_SECONDS)
        if self._draining:
            raise Refused("it is shutting down")
        if not self._free_for(group):
            held = self.held[0]
            gone = ", which has gone; its last program still runs" if held.over.is_set() else ""
            raise Refused(
                f"held by another engine, {held.engine}{gone}: end that one, or take another worker"
            )

    def _free_for(self, group: str) -> bool:
        return all(group and lease.group == group for lease in self.held)

    def _run(self, lease: Lease) -> None:
        log.info("leased to %s", lease.engine)
        try:
            lease.run()
        finally:
            with self._changed:
                self.held = tuple(other for other in self.held if other is not lease)
                self._changed.notify_all()
            log.info("free again: %s", lease.reason)


def _no_room(wanted: CacheGeometry, filled: int, memory_bytes: int) -> str:
    beside = f", of which other hosts of this engine have {filled / 2**20:,.0f} MiB" if filled else ""
    return (
        f"{wanted.num_pages} KV pages need {wanted.num_pages * wanted.bytes_per_page / 2**20:,.0f} MiB, and "
        f"it may use {memory_bytes / 2**20:,.0f} MiB{beside}: ask for fewer with num_pages, or raise its "
        "--memory-fraction"
    )
