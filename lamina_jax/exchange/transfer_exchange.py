"""The exchange of device arrays with attention workers of the same platform.

What the workers are told crosses as frames, like in `lamina_jax.exchange.remote`; q, k, v and the answers are
offered and pulled. The decode loop waits for neither: an answer is pulled when its query is sent, and
programs are queued behind it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from lamina_jax.config import SecurityConfig, host_and_port, is_loopback
from lamina_jax.core import WorkerLost
from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.control import WorkerClient, WorkerError
from lamina_jax.exchange.control_messages import Description
from lamina_jax.exchange.data import ANSWER_SECONDS
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.pieces import Arrays, arrays_of, messages_of
from lamina_jax.exchange.remote import RemoteExchange, RemoteStep, Worker
from lamina_jax.exchange.sender import Outgoing
from lamina_jax.exchange.transfer import TransferLink, own_and_peer_ip
from lamina_jax.pool.spec import KEY_BYTES, TransferSpec

WHY_NOT_JAX = (
    "exchange=auto takes sockets or gRPC, never jax: between processes of one machine a round trip of device "
    "arrays takes several times as long (bench exchange), and between accelerators it has not been measured"
)

LOOK_SECONDS = 1.0
"""Between two looks at what is late."""


class TransferWorker(Worker):
    """One attention worker that is reached by `link`; see `Worker`."""

    def __init__(self, address: str, channel: Channel, link: TransferLink) -> None:
        super().__init__(address, channel)
        self.link = link
        self._due: deque[tuple[float, list[jax.Array]]] = deque()

    def lose(self, reason: str) -> None:
        super().lose(reason)
        self.link.cut()

    def pull(self, header: Header, structs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """An answer, which may come later.

        Raises:
            WorkerLost: it will not.
        """
        self.check()
        try:
            arrays = self.link.pull(header, structs)
        except ChannelClosed as error:
            raise WorkerLost(self.address, self.lost or str(error)) from error
        self._due.append((time.monotonic(), arrays))
        return arrays

    def check(self) -> None:
        """Forget the answers that have come; see `Worker.check`."""
        while self._due and _ready(self._due[0][1]):
            self._due.popleft()
        super().check()

    def blame(self) -> None:
        """Something has failed: lose the worker if the link with it has ended."""
        if not self.link.connected:
            self.lose("the connection by which its device arrays come has ended")

    def look(self) -> None:
        """Lose the worker where the oldest answer that is due is late; from any thread."""
        try:
            since, arrays = self._due[0]
        except IndexError:
            return
        if time.monotonic() - since > ANSWER_SECONDS and not _ready(arrays):
            self.lose(f"it has not answered in {ANSWER_SECONDS:g} s")


class TransferExchange(RemoteExchange):
    """Between the compute mesh and workers of its platform; see `RemoteExchange` for the arguments.

    k and v of all tokens go to every worker, also where each keeps only some of them: shapes are static.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sends_kept = False
        self._step_type = TransferStep
        self._closed = threading.Event()
        self.answer_structs = cache(self._answer_structs)

    def attach(self, workers: Sequence[Worker]) -> None:
        super().attach(workers)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, args=(self._closed,), name="late answers", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _watch(self, closed: threading.Event) -> None:
        while not closed.wait(LOOK_SECONDS):
            for worker in self.workers:
                if isinstance(worker, TransferWorker):
                    worker.look()

    def _answer_structs(self, pieces: range, nbytes: int) -> list[jax.ShapeDtypeStruct]:
        """An answer's messages of `nbytes` each, on the devices of the shards of `pieces`."""
        size = nbytes // self.message_dtype.itemsize
        homes = [self._compute[self.table.pieces[piece].shard] for piece in pieces]
        return [
            jax.ShapeDtypeStruct((size,), self.message_dtype, sharding=SingleDeviceSharding(home))
            for home in homes
        ]


class TransferStep(RemoteStep):
    """One microbatch's step; see `lamina_jax.exchange.base.StepExchange`."""

    _exchange: TransferExchange

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._coming: dict[int, list[jax.Array]] = {}

    def receive(self, layer: int) -> tuple[Any, ...]:
        return arrays_of(self._coming.pop(layer), self._exchange.table, self._exchange.joined)

    def _send(self, kind: Kind, layer: int, arrays: Arrays) -> None:
        exchange, header = self._exchange, self._header._replace(kind=kind, layer=layer)
        for target in self._targets:
            worker = target.worker
            assert isinstance(worker, TransferWorker)
            sent = messages_of(
                arrays, exchange.table, target.segment, target.pieces, kv_alone=kind == Kind.KV
            )
            worker.link.offer(header, sent)
            exchange.wire.count(sum([message.nbytes for message in sent]))
            exchange.send(worker, Outgoing(worker.channel, header, ()))
            if kind != Kind.KV:
                structs = exchange.answer_structs(target.pieces, target.answer_bytes)
                coming = worker.pull(header._replace(kind=Kind.ANSWER), structs)
                exchange.wire.count(len(structs) * target.answer_bytes)
                self._coming.setdefault(layer, []).extend(coming)


def _ready(arrays: list[jax.Array]) -> bool:
    """Whether all have come, or failed."""
    return all(array.is_ready() for array in arrays)  # type: ignore[attr-defined]


def open_link(client: WorkerClient, device: jax.Device) -> tuple[TransferLink, TransferSpec]:
    """Our side of a link with a worker, not yet connected, and what the worker is told of it.

    Raises:
        WorkerError: there is no way to the worker.
    """
    try:
        own_ip, worker_ip = own_and_peer_ip(*host_and_port("attention", client.address))
        key = secrets.token_bytes(KEY_BYTES)
        link = TransferLink(device, own_ip, key)
    except (ChannelClosed, RuntimeError) as error:
        raise WorkerError(client.address, f"exchange=jax: {error}", temporary=True) from None
    return link, TransferSpec(address=link.address, worker_ip=worker_ip, key=key)


def check_worker(client: WorkerClient, found: Description, platform: str, security: SecurityConfig) -> None:
    """Refuse a worker that device arrays of `platform` cannot be exchanged with.

    Raises:
        WorkerError: it is of another platform or JAX, or on a network where that must be protected.
    """
    if found.platform != platform:
        raise WorkerError(
            client.address,
            f"exchange=jax is between devices of one platform: it has {found.platform}, this side "
            f"{platform}; choose socket or grpc",
        )
    if found.jax_version != jax.__version__:
        raise WorkerError(
            client.address,
            f"exchange=jax is between processes of one JAX: it runs {found.jax_version}, this side "
            f"{jax.__version__}; choose socket or grpc, or install one release on both",
        )
    if client.ssl_context is not None or not (is_loopback(client.host) or security.insecure):
        raise WorkerError(
            client.address,
            "exchange=jax knows no TLS: choose socket or grpc, or leave TLS out and say --insecure on both "
            "sides if everyone on that network may see and change what is exchanged",
        )
