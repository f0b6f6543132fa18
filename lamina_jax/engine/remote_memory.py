"""The memory side in other processes: attention workers, leased and connected, and got back when lost."""

from __future__ import annotations

import logging
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax

from lamina_jax.compilation import Footprint, Job
from lamina_jax.config import ConfigError, EngineConfig, is_loopback
from lamina_jax.core import Sampled, StepPlan, WorkerLost
from lamina_jax.devices import Devices
from lamina_jax.engine.budget import Needs, Room, Share
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.errands import Errand
from lamina_jax.engine.memory_side import CachePlan
from lamina_jax.engine.remote_prefill import Puller, RemotePrefill
from lamina_jax.engine.runner import Elsewhere
from lamina_jax.engine.taking import Taking
from lamina_jax.exchange.base import Exchange
from lamina_jax.exchange.control import WorkerClient, connect
from lamina_jax.exchange.pull import PullOrder
from lamina_jax.exchange.remote import RemoteExchange, Worker
from lamina_jax.exchange.timeline import Timeline
from lamina_jax.exchange.timings import Timings
from lamina_jax.exchange.trace import write_trace
from lamina_jax.exchange.transfer_exchange import (
    WHY_NOT_JAX,
    TransferExchange,
    check_worker,
)
from lamina_jax.hosts.member import Member
from lamina_jax.hosts.messages import Traffic
from lamina_jax.pool.shares import HeadShare, host_shares, host_table
from lamina_jax.pool.spec import WorkerSpec

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
"""Between two words on how far a worker is that the engine waits for."""

NOTICE_SECONDS = 3.0
"""In which the loss of a worker is noticed."""

TRY_SECONDS = 1.5
"""How long one try to get lost workers back waits for them."""


class RemoteMemory:
    """The workers that `config.attention` names; waits until they are up. See `MemorySide`.

    Of several compute hosts each leases the workers' devices that hold heads of its own.

    Args:
        member: which compute host this is, of how many; None: the only one.

    Raises:
        ConfigError: workers that cannot be used, or not together.
    """

    def __init__(
        self,
        config: EngineConfig,
        devices: Devices,
        report: Callable[[str, int, int], None],
        *,
        num_kv_heads: int,
        member: Member | None = None,
    ) -> None:
        self._member = member
        self._group = member.group if member else _new_group()
        self._write_trace: Callable[[], object] = lambda: None
        self._host, self._hosts = (member.host_id, member.num_hosts) if member else (0, 1)
        addresses = [address.strip() for address in (config.attention or "").split(",")]
        if config.memory_fraction is not None:
            raise ConfigError("memory_fraction is a worker's own setting: give it to lamina_jax.attend")
        self._config, self._report = config, report
        self.elsewhere: Elsewhere | None = None
        self._clients = connect(addresses, config.security, config.worker_wait_seconds, report)
        found = [client.describe() for client in self._clients]
        self.workers = len(addresses)
        parts = 1 if config.partition == "heads" else self.workers
        self.devices = _devices_each(min(d.devices for d in found), self.workers // parts, num_kv_heads)
        self.names: Sequence[str] = [
            f"{address} {description.platform}:{i}"
            for address, description in zip(addresses, found, strict=True)
            for i in range(self.devices)
        ]
        if config.exchange == "jax":
            for client, description in zip(self._clients, found, strict=True):
                check_worker(client, description, devices.compute[0].platform, config.security)
        elif config.exchange == "auto":
            log.info("%s", WHY_NOT_JAX)
        on_cpus = {d.platform for d in found} | {d.platform for d in devices.compute} == {"cpu"}
        self.share_silicon = on_cpus and all(is_loopback(client.host) for client in self._clients)
        self._needs: dict[str, Footprint] = {}
        self._room = "each worker" if self.workers > 1 else "the worker"
        self.rooms = {self._room: Room(min(d.memory_bytes for d in found), 1.0)}

    def probe(self, plan: CachePlan) -> list[Job]:
        specs = {client.address: (client, spec) for client, spec in self._specs_of(plan)}
        return [(f"attention worker {name}", partial(self._measure, *pair)) for name, pair in specs.items()]

    def shares(self, plan: CachePlan) -> list[Share]:
        page = plan.geometry.share(plan.table.workers).bytes_per_page
        # A worker runs one program of a lease at a time; of each host there may be one. The same for all.
        temporaries, results = (self._hosts * max(sizes) for sizes in zip(*self._needs.values(), strict=True))
        each = Needs(0, temporaries, results, page)
        return [(self._room, Needs(*(self.devices * size for size in each)))]

    def _measure(self, client: WorkerClient, spec: WorkerSpec) -> None:
        self._needs[client.address] = client.measure(spec, group=self._group)

    def open(self, plan: CachePlan) -> tuple[Exchange, list[Job]]:
        geometry = plan.geometry
        self._specs = self._specs_of(plan)
        self.timings = self._new_timings(geometry.num_layers)
        by_transfer = self._config.exchange == "jax"
        exchange = (TransferExchange if by_transfer else RemoteExchange)(
            host_shares(plan.table, self.devices, self._host, self._hosts),
            host_table(plan.table, self._host, self._hosts),
            plan.mesh,
            plan.partition,
            wire_dtype=geometry.wire_dtype,
            head_dim=geometry.head_dim,
            timings=self.timings,
        )
        self._exchange = exchange
        self._device = plan.mesh.local_devices[0]
        self._taking = [self._take(*pair) for pair in self._specs]
        jobs: list[Job] = [("attention workers", self._attach)]
        if self._config.prefill is not None and self._host == 0:
            pullers = partial(self._pullers, plan)
            self.elsewhere = prefill = RemotePrefill(self._config, plan.limits.max_model_len - 1, pullers)
            jobs.append(("prefill hosts", partial(prefill.connect, self._report)))
        return exchange, jobs

    def _take(self, client: WorkerClient, spec: WorkerSpec) -> Taking:
        timed = self.timings is not None
        return Taking(client, spec, self._config.exchange, self._device, timed=timed, group=self._group)

    def _pullers(self, plan: CachePlan, errand: Errand, ticket: bytes, address: str) -> list[Puller]:
        """What each worker that holds a part of a request is told, for the lease of every compute host."""
        each = len(self._clients) // plan.partition.workers
        pages = errand.pages[: -(-len(errand.tokens) // plan.partition.page_size)]
        pullers = []
        for held in plan.partition.holders(pages):
            for share in self._shares_of_all_hosts(plan):
                client = self._clients[held.worker * each + share.worker]
                order = PullOrder(
                    group=self._group,
                    ticket=ticket,
                    address=address,
                    length=len(errand.tokens),
                    pages=held.pages,
                    first=held.first,
                    stride=held.stride,
                    after=self._exchange.told[held.worker],
                    kv_start=share.kv_start,
                )
                lose = partial(self._lose, client.address, self._exchange.workers)
                pullers.append(Puller(client, order, lose))
        return pullers

    def _shares_of_all_hosts(self, plan: CachePlan) -> Iterator[HeadShare]:
        for host in range(self._hosts):
            yield from host_shares(plan.table, self.devices, host, self._hosts)

    def _specs_of(self, plan: CachePlan) -> list[tuple[WorkerClient, WorkerSpec]]:
        """Each lease's worker, and what it is asked for."""
        shares = host_shares(plan.table, self.devices, self._host, self._hosts)
        parts = range(0, len(self._clients), len(self._clients) // plan.partition.workers)
        return [
            (self._clients[part + share.worker], self._spec(plan, share))
            for part in parts
            for share in shares
        ]

    def _spec(self, plan: CachePlan, share: HeadShare) -> WorkerSpec:
        """What a worker is asked for."""
        return WorkerSpec(
            geometry=share.of(plan.geometry),
            kv_start=share.kv_start,
            first_device=share.first_device,
            devices=share.devices,
            windows=tuple(plan.windows),
            scales=tuple(kind.scale for kind in plan.kinds),
            softcaps=tuple(kind.softcap for kind in plan.kinds),
            buckets=tuple((*bucket, cached) for bucket, cached in plan.buckets()),
            pages_per_request=plan.pages_per_request,
            overlap=plan.limits.overlap,
            pieces=len(share.pieces) // share.devices,
            copies=plan.table.copies,
            by_token=plan.partition.kind == "tokens" and self._config.exchange != "jax",
            pulls=self._config.prefill is not None,
        )

    def runner(self, compute: ComputeSide, exchange: Exchange, *, overlap: bool) -> RemoteRunner:
        runner = RemoteRunner(compute, exchange, overlap=overlap, memory=self)
        if self._config.trace is not None and self.timings is not None:
            self._write_trace = weakref.finalize(runner, write_trace, self._config.trace, self.timings)
        return runner

    def page_devices(self) -> list[str]:
        return list(self.names)

    def check(self) -> None:
        """Raises `WorkerLost` where a worker has been lost."""
        for worker in self._exchange.workers:
            worker.check()

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Device arrays that a lost worker owes fail like those of a program: tell the two apart.

        Raises:
            WorkerLost: a worker has been lost, or turns out to be.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self._config.exchange != "jax":
                raise
            until = time.monotonic() + NOTICE_SECONDS
            while time.monotonic() < until:
                for worker in self._exchange.workers:
                    worker.blame()
                self.check()
                time.sleep(0.02)
            raise

    def recover(self) -> bool:
        """One try to have all workers again, each with an empty cache; see `RecoverableRunner.recover`."""
        if self._exchange.workers:
            self._exchange.close()
            for taking in self._taking:
                taking.release()
            # A lease of before may still be ending there: it is not to be taken for one of these.
            self._group = _new_group()
            self._taking = [self._take(*pair) for pair in self._specs]
        until = time.monotonic() + TRY_SECONDS
        for taking in self._taking:
            taking.join(max(0.0, until - time.monotonic()))
        for i, taking in enumerate(self._taking):
            if taking.error is not None:
                self._taking[i] = self._take(*self._specs[i])  # for the next try
                raise WorkerLost(taking.client.address, taking.error.reason)
        if any(taking.is_alive() for taking in self._taking):
            return False
        self._attach()
        return True

    def _new_timings(self, layers: int) -> Timings | None:
        config = self._config
        if not config.timings and config.trace is None:
            return None
        timings = Timings(layers, [client.address for client, _ in self._specs])
        if config.trace is not None:
            try:
                write_trace(config.trace, timings)  # of nothing yet; to find out whether it can be written
            except OSError as error:
                raise ConfigError(f"trace={config.trace!r} cannot be written: {error.strerror}") from None
        return timings

    def close(self) -> None:
        """Give all workers back, and write the trace, if there is one."""
        self._exchange.close()
        self._write_trace()
        for taking in self._taking:
            taking.release()
        for client in self._clients:
            client.close()

    def _attach(self) -> None:
        """Wait for all workers and connect the exchange with them; raises the first `WorkerError`."""
        for taking in self._taking:
            while taking.is_alive():
                taking.join(REPORT_SECONDS)
                self._report(f"compiling on {taking.client.address}", *taking.compiled)
            if taking.error is not None:
                raise taking.error
        self._exchange.attach([taking.worker for taking in self._taking])
        for taking in self._taking:
            taking.lease.on_lost(partial(self._lose, taking.client.address, [taking.worker]))

    def _lose(self, address: str, workers: Sequence[Worker], reason: str) -> None:
        """The worker at an address is lost; `workers` are those that this host exchanges with."""
        for worker in workers:
            if worker.address == address:
                worker.lose(reason)
        if self._member is not None:
            self._member.lost(f"attention worker {address}: {reason}")


def _new_group() -> str:
    return secrets.token_hex(16)


def _devices_each(most: int, workers: int, num_kv_heads: int) -> int:
    """How many devices of each of `workers` workers share the heads: as many as can evenly.

    Raises:
        ConfigError: not even one of each can.
    """
    for count in range(most, 0, -1):
        if num_kv_heads % (workers * count) == 0:
            return count
    fitting = ", ".join(str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
    raise ConfigError(
        f"{workers} attention workers cannot share the model's {num_kv_heads} KV heads evenly; {fitting} "
        "would; or choose partition=requests or tokens"
    )


class RemoteRunner(DisaggregatedRunner):
    """Runs step plans over workers that can be lost; see `RecoverableRunner`."""

    def __init__(
        self, compute: ComputeSide, exchange: Exchange, *, overlap: bool, memory: RemoteMemory
    ) -> None:
        super().__init__(compute, exchange, overlap=overlap)
        self._memory, self._timings = memory, memory.timings

    def dispatch(self, plan: StepPlan) -> Any:
        if self._timings is None:
            with self._memory.losses():
                return super().dispatch(plan)
        self._timings.begin_step(plan.step)
        step = super().dispatch(plan)
        self._timings.end_dispatch()
        return step

    def _run_layers(self, order: list[int], batches: dict[int, Any]) -> None:
        if self._timings is not None:
            self._timings.begin_layers()
        super()._run_layers(order, batches)

    def read(self, step: Any) -> list[Sampled]:
        with self._memory.losses():
            results = super().read(step)
        if self._timings is not None:
            self._timings.end_step()
        return results

    def timeline(self) -> Timeline | None:
        """The last steps, layer by layer, where their times are kept."""
        return None if self._timings is None else Timeline(self._timings)

    def stats(self) -> dict[str, Any]:
        """With "timings" where they are kept: see docs/timings.md."""
        stats = super().stats()
        if self._timings is not None:
            stats["timings"] = {**Timeline(self._timings).sums(), **self._timings.host()}
        return stats

    def traffic(self) -> Traffic:
        """What has crossed so far between this host and the workers."""
        wire = self.exchange.wire
        return Traffic(self._steps, wire.tensor_bytes, wire.messages, wire.metadata_bytes, self._seconds)

    def check(self) -> None:
        self._memory.check()

    def recover(self) -> bool:
        self.forget()
        return self._memory.recover()

    def close(self) -> None:
        self.forget()
        self._memory.close()
