"""A session whose tensors come and go as device arrays.

Frames say what comes, in the engine's own order, and hold none of it. The session pulls it, queues its
programs behind, and offers their answers; it is some frames ahead of the devices, and never further.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from lamina_jax.config import ConfigError, is_loopback
from lamina_jax.cpu_kernels import CpuKernels
from lamina_jax.exchange.channel import ChannelClosed, Frame
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.transfer import TransferLink
from lamina_jax.pool.shard import Messages
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.session import Answer, Session

MOST_QUEUED = 8
"""Frames whose arrays are asked for and may not have come. XLA on a CPU takes 32 programs of a device."""


class TransferSession(Session):
    """See `Session`; `spec.transfer` is not None.

    Args:
        insecure: listen on an address that other machines reach: nothing of this is encrypted.

    Raises:
        ConfigError: also where the engine's address cannot be reached, or ours not be listened on.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        devices: Sequence[jax.Device],
        cpu_kernels: CpuKernels = "xla",
        *,
        insecure: bool = False,
    ) -> None:
        super().__init__(spec, devices, cpu_kernels)
        self._queued: deque[tuple[list[jax.Array], list[jax.Array]]] = deque()  # pulled, and answers
        self._pulled: list[jax.Array] = []
        assert spec.transfer is not None
        offered = spec.transfer
        if not (is_loopback(offered.worker_ip) or insecure):
            raise ConfigError(
                f"exchange=jax over {offered.worker_ip} is neither encrypted nor protected: start this "
                "worker with --insecure if everyone on that network may use the cache"
            )
        try:
            self._link = TransferLink(devices[0], offered.worker_ip, offered.key)
            self._link.connect(offered.address)
        except (ChannelClosed, RuntimeError, ValueError) as error:
            raise ConfigError(f"exchange=jax over {offered.worker_ip}: {error}") from None
        self.transfer_address = self._link.address

    def hang_up(self) -> None:
        self._link.cut()

    def room(self, header: Header) -> int:
        if header.kind == Kind.BEGIN:
            return super().room(header)
        self._shape(header)
        if header.length:
            raise ProtocolError(f"{header}: of exchange=jax no tensors come in frames")
        return 0

    def answers(self, frames: Iterable[Frame]) -> Iterator[Answer]:
        """Do what the frames say, in order. Answers are offered, and none is yielded."""
        yield from ()
        for header, payload in frames:
            if header.kind == Kind.BEGIN:
                self._begin(header, payload)
            elif self._has_room():
                with self._gaps.frame():
                    parts = self._do(header, payload)
                self._queued.append((self._pulled, parts))
                if parts:
                    self._link.offer(header._replace(kind=Kind.ANSWER), parts)

    def _has_room(self) -> bool:
        """Wait until few enough frames are queued; False once an array of the engine's has failed.

        Then the engine has failed, or lost another worker, and ends the lease: this worker is not to be the
        first to leave, lest it be taken for the one that was lost.
        """
        while len(self._queued) >= MOST_QUEUED:
            pulled, answers = self._queued[0]
            try:
                jax.block_until_ready(pulled)
            except jax.errors.JaxRuntimeError:
                return False
            jax.block_until_ready(answers)  # where these fail, it is this worker that gives up
            self._queued.popleft()
        return True

    def _sent(self, header: Header, payload: np.ndarray) -> list[Messages]:
        count, *shape = self._shape(header)
        each = count // len(self._shards)
        arrays = self._pulled = self._link.pull(
            header,
            [
                jax.ShapeDtypeStruct(shape, self._wire, sharding=SingleDeviceSharding(shard.device))
                for shard in self._shards
                for _ in range(each)
            ],
        )
        return [tuple(arrays[i : i + each]) for i in range(0, count, each)]


def session_for(
    spec: WorkerSpec,
    devices: Sequence[jax.Device],
    cpu_kernels: CpuKernels = "xla",
    *,
    insecure: bool = False,
) -> Session:
    """The session that a lease asks for; see `Session` and `TransferSession`."""
    if spec.transfer is None:
        return Session(spec, devices, cpu_kernels)
    return TransferSession(spec, devices, cpu_kernels, insecure=insecure)
