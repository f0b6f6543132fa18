"""From a configuration to an engine that is ready: devices, weights, slices, pages, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.compilation import CompilationCounter, Job, compile_all
from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.devices import Devices, choose_devices
from lamina_jax.engine.buckets import SMALLEST_BATCH, Bucket
from lamina_jax.engine.budget import plan_budget
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.compute import ComputeSide, step_shapes
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.engine import Engine
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.placement import bytes_per_device, place_weight
from lamina_jax.engine.programs import windows_of
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.sampler import Sampler
from lamina_jax.engine.scheduler import Scheduler
from lamina_jax.engine.warmup import measure_prefill
from lamina_jax.exchange.local import LocalExchange
from lamina_jax.models import ModelConfig, Storage, as_function, build
from lamina_jax.models.hf_config import CheckpointError, read_config
from lamina_jax.pool.geometry import CacheGeometry, HeadTable, head_table
from lamina_jax.pool.shard import AttentionKind, AttentionShard, CachedPart
from lamina_jax.slicing import Sliced, slice_at_attention
from lamina_jax.weights.hub import HUB_ID, find_snapshot
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
        disaggregated=disaggregated,
        num_kv_heads=shape.num_kv_heads,
    )
    limits = resolve_limits(config, shape.max_position, share_silicon=devices.share_silicon)
    mesh = Mesh(np.array(devices.compute), ("tensor",))
    parts, copies = _collocated, 1
    if disaggregated:
        sides = len(devices.compute), len(devices.memory)
        table = head_table(shape.num_heads, shape.num_kv_heads, *sides)
        parts, copies = partial(_disaggregated, cached_part, table), table.copies
    report("loading weights", 0, 0)
    storage = _storage(config, shape, devices)
    model = build(shape, storage)
    load_model(folder, model, partial(place_weight, mesh=mesh, head_dim=shape.head_dim, copies=copies))
    tokenizer = load_tokenizer(folder)

    report("slicing", 0, 0)
    fn, params = as_function(model)
    sliced = slice_at_attention(fn, params, *step_shapes((SMALLEST_BATCH, 2)))
    log.debug("%s", sliced.explain())
    geometry = CacheGeometry(
        num_layers=shape.num_layers,
        num_pages=0,
        page_size=config.page_size,
        num_kv_heads=shape.num_kv_heads,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        dtype=str(storage.dtype) if config.kv_dtype == "auto" else config.kv_dtype,
        wire_dtype=str(storage.dtype),
    )
    weight_bytes = bytes_per_device(jax.tree.leaves(params))
    budget = plan_budget(
        config, geometry, devices, weight_bytes=weight_bytes, max_model_len=limits.max_model_len
    )
    log.info("memory budget\n%s", budget.table(config.page_size))
    geometry = replace(geometry, num_pages=budget.num_pages)

    runner, pages, jobs = parts(sliced, params, geometry, mesh, devices, limits)
    page_devices = _devices_of(pages)
    compile_all(jobs, lambda done, total: report("compiling", done, total))
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
            "microbatches": limits.microbatches,
            "overlap": limits.overlap,
            "max_model_len": limits.max_model_len,
            "weight_bytes_per_device": weight_bytes,
            "weight_devices": _devices_of(jax.tree.leaves(params)),
            "page_devices": page_devices,
        },
        compilations=CompilationCounter(),
    )


def _disaggregated(
    cached_part: CachedPart | None,
    table: HeadTable,
    sliced: Sliced,
    params: Any,
    geometry: CacheGeometry,
    mesh: Mesh,
    devices: Devices,
    limits: Limits,
) -> tuple[ModelRunner, list[jax.Array], list[Job]]:
    for piece in table.pieces:
        log.info("%s and %s: %s", devices.compute[piece.shard], devices.memory[piece.worker], piece)
    kinds = [AttentionKind(op.scale, op.softcap) for op in sliced.attentions]
    windows = windows_of(sliced)
    share = geometry.share(table.workers)
    shards = [
        AttentionShard(
            share,
            device,
            windows,
            kinds,
            pieces=table.per_worker,
            copies=table.copies,
            cached_part=cached_part,
        )
        for device in devices.memory
    ]
    sampler = Sampler(NamedSharding(mesh, P()), limits.rows, limits.max_model_len)
    compute = ComputeSide(sliced, params, mesh, table, limits.rows, sampler)
    jobs: list[Job] = []
    for bucket, cached in _buckets(limits):
        jobs += compute.jobs(bucket, cached=cached, overlap=limits.overlap)
        for shard in shards:
            jobs += shard.jobs(bucket, limits.pages_per_request, cached=cached, overlap=limits.overlap)
    runner = DisaggregatedRunner(compute, LocalExchange(shards, table, mesh), overlap=limits.overlap)
    return runner, [pages for shard in shards for pages in shard.pages], jobs


def _collocated(
    sliced: Sliced, params: Any, geometry: CacheGeometry, mesh: Mesh, devices: Devices, limits: Limits
) -> tuple[ModelRunner, list[jax.Array], list[Job]]:
    if geometry.num_kv_heads % len(devices.compute):
        raise ConfigError(
            f"compute_devices names {len(devices.compute)} devices, which do not divide the model's "
            f"{geometry.num_kv_heads} KV heads"
        )
    runner = CollocatedRunner(
        sliced,
        params,
        geometry,
        mesh,
        rows=limits.rows,
        pages_per_request=limits.pages_per_request,
        sampler=Sampler(NamedSharding(mesh, P()), limits.rows, limits.max_model_len),
    )
    jobs = [job for bucket, cached in _buckets(limits) for job in runner.jobs(bucket, cached=cached)]
    return runner, runner.pages, jobs


def _buckets(limits: Limits) -> list[tuple[Bucket, bool]]:
    """Every (B, Q), and whether it has a cached part."""
    decode = [((rows, 1), True) for rows in limits.decode_buckets]
    return decode + [(bucket, cached) for bucket in limits.prefill_buckets for cached in (False, True)]


def _devices_of(arrays: Sequence[jax.Array]) -> list[str]:
    return sorted({str(device) for array in arrays for device in array.devices()})


def _storage(config: EngineConfig, shape: ModelConfig, devices: Devices) -> Storage:
    dtype = jnp.dtype(shape.dtype if config.dtype == "auto" else config.dtype)
    on_cpu = devices.compute[0].platform == "cpu"
    return Storage(dtype, "in_out" if on_cpu and dtype == jnp.float32 else "out_in")


def find_model(name: str) -> Path:
    """The folder of a model: "bundled", a path, or a hub id ("org/name") that has been downloaded.

    Raises:
        CheckpointError: there is no such folder.
    """
    if name == "bundled":
        return Path(str(resources.files("lamina_jax") / "data" / "bundled"))
    folder = Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        return find_snapshot(name)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {name!r}: give a Hugging Face folder, or 'bundled'")
    return folder
