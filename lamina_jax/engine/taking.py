"""Taking one attention worker: a lease on it, and the way by which tensors go to and from it."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import replace

import jax

from lamina_jax.exchange.control import Lease, WorkerClient, WorkerError
from lamina_jax.exchange.data import open_channel
from lamina_jax.exchange.remote import Worker
from lamina_jax.exchange.timings import clock_offset
from lamina_jax.exchange.transfer_exchange import TransferWorker, open_link
from lamina_jax.pool.spec import WorkerSpec

log = logging.getLogger(__name__)


class Taking(threading.Thread):
    """Takes a lease on a worker and opens the data channel to it, while others do what they do.

    Args:
        spec: what the worker is asked for.
        kind: `EngineConfig.exchange`.
        device: of this side's device arrays, where `kind` is "jax".
        timed: whether the worker's clock is set beside ours.
        group: of the leases of all compute hosts.

    Attributes:
        lease, worker: what came of it, unless there is an `error`.
        compiled: programs of the worker that are ready, and how many there are.
    """

    lease: Lease
    worker: Worker

    def __init__(
        self,
        client: WorkerClient,
        spec: WorkerSpec,
        kind: str,
        device: jax.Device,
        timed: bool,
        group: str,
    ) -> None:
        super().__init__(name=f"lease {client.address}", daemon=True)
        self.client, self._spec, self._kind, self._timed, self._group = client, spec, kind, timed, group
        self._device = device
        self.error: WorkerError | None = None
        self.compiled = 0, 0
        self.start()

    def _note(self, phase: str, done: int, total: int) -> None:
        self.compiled = done, total

    def run(self) -> None:
        try:
            self.worker = self._with_link() if self._kind == "jax" else self._with_channel()
        except WorkerError as error:
            self.error = error
        except Exception as error:  # whatever it is, the engine must hear of it
            log.exception("attention worker %s", self.client.address)
            self.error = WorkerError(self.client.address, f"{type(error).__name__}: {error}")

    def _with_channel(self) -> Worker:
        self.lease = self.client.lease(self._spec, self._note, group=self._group)
        channel = open_channel(self.client, self.lease, self._kind)
        offset = clock_offset(lambda: self.client.describe().clock_ns) if self._timed else 0
        return Worker(self.client.address, channel, offset)

    def _with_link(self) -> Worker:
        link, transfer = open_link(self.client, self._device)
        self.lease = self.client.lease(replace(self._spec, transfer=transfer), self._note, group=self._group)
        channel = open_channel(self.client, self.lease, "auto")
        link.connect(self.lease.transfer)
        return TransferWorker(self.client.address, channel, link)

    def release(self) -> None:
        """Give the lease back, if there is one."""
        with suppress(AttributeError):
            self.lease.close()
