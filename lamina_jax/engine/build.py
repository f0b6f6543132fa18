"""From a configuration to an engine that is ready: devices, weights, slices, pages, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.memory_side import CachePlan, LocalMemory, MemorySide
from lamina_jax.engine.placement import bytes_per_device, place_weight
from lamina_jax.engine.sampler import Sampler
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.engine.warmup import measure_prefill
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


def build_engine(
    config: EngineConfig,
    report: Report = lambda phase, done, total: None,
    *,
    cached_part: CachedPart | None = None,
) -> Engine:
    """Load, slice, place and compile a model.

    Args:
        report: told how far it is.
        cached_part: what the memory mesh computes attention with; None takes the platform's kernel.

    Raises:
        ConfigError: a setting that cannot be obeyed.
        CheckpointError: a folder that cannot be loaded; raised before anything is.
    """
    keep_programs(config.compilation_cache)
    folder = find_model(config.model)
    shape = read_config(folder)
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
    memory = _memory_side(config, devices, cached_part, report, shape.num_kv_heads) if disaggregated else None
    rooms = _rooms(config, devices, memory)
    limits = resolve_limits(
        config,
        shape.max_position,
        share_silicon=memory.share_silicon if memory else True,
        workers=memory.workers if memory else 1,
    )
    mesh = Mesh(np.array(devices.compute), ("tensor",))
    table = _table(shape, config, len(devices.compute), memory) if memory else None
    copies = table.copies if table else 1
    report("loading weights", 0, 0)
    storage = _storage(config, shape, devices)
    model = build(shape, storage)
    load_model(folder, model, partial(place_weight, mesh=mesh, head_dim=shape.head_dim, copies=copies))
    tokenizer = load_tokenizer(folder)

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
        runner, jobs = assembly.open(budget.num_pages)
        compiled = compiled.and_then(compile_all(jobs, partial(report, "compiling attention")))
    log.info("%s", compiled)

    scheduling = limits.scheduler(budget.num_pages, shape.vocab_size)
    if config.prefill_stall_ms < float("inf"):
        report("measuring prefill", 0, 0)
        seconds = measure_prefill(runner, scheduling)
        scheduling = replace(scheduling, prefill_seconds=seconds, prefill_stall=config.prefill_stall_ms / 1e3)
    return Engine(
        Scheduler(scheduling),
        runner,
        tokenizer=tokenizer,
        eos_token_ids=shape.eos_token_ids,
        vocab_size=shape.vocab_size,
        facts={
            "placement": config.placement,
            "native_kernels": native,
            "microbatches": limits.microbatches,
            "overlap": limits.overlap,
            "max_model_len": limits.max_model_len,
            "compiled": compiled._asdict(),
            "weight_bytes_per_device": weight_bytes,
            "weight_devices": sorted({str(device) for device in devices.compute}),
            "page_devices": assembly.page_devices(),
        },
        compilations=CompilationCounter(),
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
) -> MemorySide:
    if config.attention is None:
        native = use_native(config.cpu_kernels, devices.memory[0])
        return LocalMemory(devices, config.memory_fraction, cached_part, native=native)
    if cached_part is not None:
        raise ConfigError("cached_part runs in this process, and attention names workers elsewhere")
    from lamina_jax.engine.remote_memory import RemoteMemory

    return RemoteMemory(config, devices, report, num_kv_heads=num_kv_heads)


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
