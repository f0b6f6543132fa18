"""From a configuration to an engine that is ready: devices, weights, slices, pages, programs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.compilation import CompilationCounter, compile_all, no_collections
from lamina_jax.compilation_cache import keep_programs
from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.cpu_kernels import use_native
from lamina_jax.devices import Devices, choose_devices
from lamina_jax.engine.assembly import Assembly, Collocated, Split
from lamina_jax.engine.buckets import SMALLEST_BATCH
from lamina_jax.engine.budget import Room, plan_budget, rooms_of, wanted_pages
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.compute import ComputeSide, step_shapes
from lamina_jax.engine.engine import Engine
from lamina_jax.engine.leading import HostRunner, LeadingRunner, follow
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.memory_side import CachePlan, LocalMemory, MemorySide
from lamina_jax.engine.placement import bytes_per_device, place_weight
from lamina_jax.engine.runner import Elsewhere, ModelRunner
from lamina_jax.engine.sampler import Sampler
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.engine.warmup import measure_prefill
from lamina_jax.engine.world import of_all_hosts
from lamina_jax.hosts.alarm import Alarm
from lamina_jax.hosts.detect import placed_by
from lamina_jax.hosts.facts import facts_of
from lamina_jax.hosts.member import Member
from lamina_jax.hosts.world import join, lead
from lamina_jax.memory import ACCELERATOR_FRACTION, default_fraction
from lamina_jax.models import ModelConfig, Storage, as_function, build
from lamina_jax.models.hf_config import read_config
from lamina_jax.pool.geometry import CacheGeometry, HeadTable, geometry_of, head_table
from lamina_jax.pool.partition import Partition
from lamina_jax.pool.shard import CachedPart
from lamina_jax.slicing import Sliced, slice_at_attention
from lamina_jax.weights.hub import find_model
from lamina_jax.weights.loader import load_model
from lamina_jax.weights.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
"""`report(phase, done, total)` while an engine starts; total is 0 where it is not known."""


@dataclass(frozen=True)
class Built:
    """A runner whose programs are compiled, and what an engine has to know of it.

    Attributes:
        num_pages: of each part of the cache.
        facts: what does not change, for `Engine.stats`.
        elsewhere: prefills prompts on other hosts, where there are some.
    """

    runner: ModelRunner
    limits: Limits
    num_pages: int
    shape: ModelConfig
    facts: dict[str, Any]
    elsewhere: Elsewhere | None


def build_engine(
    config: EngineConfig,
    report: Report = lambda phase, done, total: None,
    *,
    cached_part: CachedPart | None = None,
    alarm: Alarm | None = None,
) -> Engine:
    """Load, slice, place and compile a model; on several compute hosts, as host 0.

    Args:
        report: told how far it is.
        cached_part: what the memory mesh computes attention with; None takes the platform's kernel.
        alarm: rung when a compute host is lost; None: one that tells the log.

    Raises:
        ConfigError: a setting that cannot be obeyed.
        CheckpointError: a folder that cannot be loaded; raised before anything is.
    """
    keep_programs(config.compilation_cache)
    config = placed_by(config, os.environ)
    folder = find_model(config.model)
    shape, tokenizer = read_config(folder), load_tokenizer(folder)
    if config.coordinator is None:
        built = _build(config, report, folder, shape, cached_part=cached_part)
    else:
        if config.host_id:
            raise ConfigError(f"host_id={config.host_id}: host 0 is the engine; run lamina_jax.serve here")
        leader = lead(config, facts_of(config, shape, folder, jax.__version__), alarm or Alarm(), report)
        with _telling(leader):
            built = _build(config, report, folder, shape, member=leader)
            leader.compiled(report)
        assert isinstance(built.runner, HostRunner)
        built = replace(built, runner=LeadingRunner(built.runner, leader))
    scheduling = built.limits.scheduler(built.num_pages, shape.vocab_size)
    if config.prefill_stall_ms < float("inf"):
        report("measuring prefill", 0, 0)
        seconds = measure_prefill(built.runner, scheduling)
        scheduling = replace(scheduling, prefill_seconds=seconds, prefill_stall=config.prefill_stall_ms / 1e3)
    return Engine(
        Scheduler(scheduling),
        built.runner,
        tokenizer=tokenizer,
        eos_token_ids=shape.eos_token_ids,
        vocab_size=shape.vocab_size,
        facts=built.facts,
        compilations=CompilationCounter(),
        elsewhere=built.elsewhere,
    )


def run_follower(
    config: EngineConfig, alarm: Alarm, report: Report = lambda phase, done, total: None
) -> None:
    """Be a compute host that host 0 leads, until that ends.

    Args:
        alarm: rung when a host or a worker is lost.

    Raises:
        ConfigError, CheckpointError: as `build_engine`, or host 0 is not there or refuses this host.
    """
    keep_programs(config.compilation_cache)
    folder = find_model(config.model)
    shape = read_config(folder)
    follower = join(config, facts_of(config, shape, folder, jax.__version__), alarm, report)
    with _telling(follower):
        runner = _build(config, report, folder, shape, member=follower).runner
        follower.compiled(report)
    assert isinstance(runner, HostRunner)
    follow(runner, follower)


@contextmanager
def _telling(member: Member) -> Iterator[None]:
    """Have the other hosts hear why this one cannot go on."""
    try:
        yield
    except Exception as error:
        member.fail(str(error))
        raise


def _build(
    config: EngineConfig,
    report: Report,
    folder: Path,
    shape: ModelConfig,
    *,
    cached_part: CachedPart | None = None,
    member: Member | None = None,
) -> Built:
    disaggregated = config.placement == "disaggregated"
    if cached_part is not None and not disaggregated:
        raise ConfigError(
            f"cached_part is for placement=disaggregated, got placement={config.placement}: "
            "a collocated engine computes attention inside its own program"
        )
    devices = choose_devices(
        config.compute_devices,
        config.memory_devices,
        disaggregated=disaggregated and config.attention is None,
        num_kv_heads=shape.num_kv_heads if config.partition == "heads" else None,
    )
    native = use_native(config.cpu_kernels, devices.compute[0])
    if config.memory_devices is None and use_native(config.cpu_kernels, devices.memory[0]):
        devices = replace(devices, memory=devices.memory[:1])  # whose kernels use every core
    kv_heads = shape.num_kv_heads
    memory = _memory_side(config, devices, cached_part, report, kv_heads, member) if disaggregated else None
    rooms = _rooms(config, devices, memory)
    limits = resolve_limits(
        config,
        shape.max_position,
        share_silicon=memory.share_silicon if memory else True,
        workers=memory.workers if memory else 1,
    )
    mesh = Mesh(np.array(of_all_hosts(devices.compute)), ("tensor",))
    table = _table(shape, config, mesh.size, memory) if memory else None
    copies = table.copies if table else 1
    report("loading weights", 0, 0)
    storage = _storage(config, shape, devices)
    model = build(shape, storage)
    load_model(folder, model, partial(place_weight, mesh=mesh, head_dim=shape.head_dim, copies=copies))

    report("slicing", 0, 0)
    fn, params = as_function(model)
    sliced = slice_at_attention(fn, params, *step_shapes((SMALLEST_BATCH, 2)))
    log.debug("%s", sliced.explain())
    geometry = geometry_of(config, shape, config.num_pages or wanted_pages(limits))
    sampler = Sampler(NamedSharding(mesh, P()), limits.rows, limits.max_model_len)
    assembly: Assembly
    if memory and table:
        assembly = _split(memory, table, sliced, params, geometry, mesh, limits, sampler, native=native)
    else:
        assembly = _collocated(sliced, params, geometry, mesh, limits, sampler, native=native)

    weight_bytes = bytes_per_device(jax.tree.leaves(params))
    with no_collections():
        compiled = compile_all(assembly.probe(), partial(report, "compiling"))
        budget = plan_budget(rooms, assembly.shares(weight_bytes), config, limits)
        log.info("%s", budget.table())
        num_pages = member.agree(budget.num_pages) if member else budget.num_pages
        runner, jobs = assembly.open(num_pages)
        compiled = compiled.and_then(compile_all(jobs, partial(report, "compiling attention")))
    log.info("%s", compiled)

    return Built(
        runner,
        limits,
        num_pages,
        shape,
        facts={
            "placement": config.placement,
            "native_kernels": native,
            "microbatches": limits.microbatches,
            "overlap": limits.overlap,
            "max_model_len": limits.max_model_len,
            "compiled": compiled._asdict(),
            "weight_bytes_per_device": weight_bytes,
            "weight_devices": sorted({str(device) for device in mesh.devices.flat}),
            "page_devices": assembly.page_devices(),
        },
        elsewhere=memory.elsewhere if memory else None,
    )


def _rooms(config: EngineConfig, devices: Devices, memory: MemorySide | None) -> Mapping[str, Room]:
    """The memory that may be filled: less of main memory where the cache is to grow in it."""
    if memory is None:
        return rooms_of(devices.compute, config.memory_fraction or default_fraction(devices.compute))
    compute = rooms_of(devices.compute, config.memory_fraction or ACCELERATOR_FRACTION)
    return {**compute, **memory.rooms}


def _memory_side(
    config: EngineConfig,
    devices: Devices,
    cached_part: CachedPart | None,
    report: Report,
    num_kv_heads: int,
    member: Member | None,
) -> MemorySide:
    if config.attention is None:
        native = use_native(config.cpu_kernels, devices.memory[0])
        return LocalMemory(devices, config.memory_fraction, cached_part, native=native)
    if cached_part is not None:
        raise ConfigError("cached_part runs in this process, and attention names workers elsewhere")
    from lamina_jax.engine.remote_memory import RemoteMemory

    return RemoteMemory(config, devices, report, num_kv_heads=num_kv_heads, member=member)


def _table(shape: ModelConfig, config: EngineConfig, shards: int, memory: MemorySide) -> HeadTable:
    """Which heads the compute devices exchange with the devices of one part of the cache."""
    parts = 1 if config.partition == "heads" else memory.workers
    holders = memory.workers * memory.devices // parts
    return head_table(shape.num_heads, shape.num_kv_heads, shards, holders)


def _split(
    memory: MemorySide,
    table: HeadTable,
    sliced: Sliced,
    params: Any,
    geometry: CacheGeometry,
    mesh: Mesh,
    limits: Limits,
    sampler: Sampler,
    *,
    native: bool,
) -> Split:
    partition = Partition(limits.partition, limits.workers, geometry.num_pages, geometry.page_size)
    compute = ComputeSide(
        sliced,
        params,
        mesh,
        table,
        partition=partition,
        wire_dtype=geometry.wire_dtype,
        rows=limits.rows,
        sampler=sampler,
        native=native,
    )
    plan = CachePlan(
        geometry=geometry, partition=partition, table=table, mesh=mesh, limits=limits, sliced=sliced
    )
    return Split(compute, memory, plan)


def _collocated(
    sliced: Sliced,
    params: Any,
    geometry: CacheGeometry,
    mesh: Mesh,
    limits: Limits,
    sampler: Sampler,
    *,
    native: bool,
) -> Collocated:
    if geometry.num_kv_heads % mesh.size:
        raise ConfigError(
            f"compute_devices names {mesh.size} devices, which do not divide the model's "
            f"{geometry.num_kv_heads} KV heads"
        )
    runner = CollocatedRunner(
        sliced,
        params,
        geometry,
        mesh,
        rows=limits.rows,
        pages_per_request=limits.pages_per_request,
        sampler=sampler,
        native=native,
    )
    return Collocated(runner, list(mesh.devices.flat), limits, geometry.share(mesh.size).bytes_per_page)


def _storage(config: EngineConfig, shape: ModelConfig, devices: Devices) -> Storage:
    dtype = jnp.dtype(shape.dtype if config.dtype == "auto" else config.dtype)
    on_cpu = devices.compute[0].platform == "cpu"
    return Storage(
        dtype,
        layout="in_out" if on_cpu and dtype == jnp.float32 else "out_in",
        gathered_as="bits" if on_cpu else "floats",
    )
