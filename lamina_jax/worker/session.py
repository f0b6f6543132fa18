"""An attention worker's side of one lease: frames in, answers out.

It has the KV pages of one engine and the programs over them. It knows nothing of sockets, gRPC or leases:
whoever carries the frames runs `answers`, and drops the session when the lease ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from lamina_jax.compilation import Footprint, Job
from lamina_jax.config import ConfigError
from lamina_jax.cpu_kernels import CpuKernels, use_native
from lamina_jax.exchange.channel import Frame
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.pull import PULL_TOKENS, read_stored
from lamina_jax.pool.message import message_dtype
from lamina_jax.pool.metadata import StepMetadata
from lamina_jax.pool.shard import AttentionKind, AttentionShard, Begun, Bucket, Messages
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.gaps import Appends, Gaps

MOST_MICROBATCHES = 16
"""That an engine may have begun; it has n and one of prefill."""

Answer = tuple[Header, list[np.ndarray]]


class Session:
    """The share of the KV cache that `spec` describes, on the first `spec.devices` of `devices`.

    The pages are there from `hold` on.

    Args:
        gaps: when pulled KV may be written.

    Attributes:
        geometry: over all of its devices.
        transfer_address: of its transfer server, where tensors do not come in frames.

    Raises:
        ConfigError: too few devices, or heads that they cannot share.
    """

    transfer_address = ""

    def __init__(
        self,
        spec: WorkerSpec,
        devices: Sequence[jax.Device],
        cpu_kernels: CpuKernels = "xla",
        gaps: Gaps | None = None,
    ) -> None:
        g = spec.geometry
        if len(devices) < spec.devices:
            raise ConfigError(f"{spec.devices} devices are asked for, this worker has {len(devices)}")
        if spec.devices < 1 or g.num_kv_heads % spec.devices:
            raise ConfigError(f"{spec.devices} devices cannot share {g.num_kv_heads} KV heads")
        self.geometry, self._gaps, self._appends = g, gaps or Gaps(), Appends()
        self._spec, self._wire = spec, message_dtype(g.wire_dtype)
        kinds = [AttentionKind(*kind) for kind in zip(spec.scales, spec.softcaps, strict=True)]
        self._shards = [
            AttentionShard(
                g.share(spec.devices),
                device,
                spec.windows,
                kinds,
                pieces=spec.pieces,
                copies=spec.copies,
                native=use_native(cpu_kernels, device),
            )
            for device in devices[: spec.devices]
        ]
        self._shapes = {(rows, queries): _shapes(spec, rows, queries) for rows, queries, _ in spec.buckets}
        self._begun: dict[int, list[Begun]] = {}

    def hold(self) -> None:
        """Make the pages."""
        for shard in self._shards:
            shard.hold()

    def probe(self) -> Iterator[Job]:
        """What compiles the programs that need the most memory, so that `footprint` can tell; all devices
        need as much."""
        spec = self._spec
        with_cache = [(rows, queries) for rows, queries, cached in spec.buckets if cached]
        bucket = max(with_cache, key=math.prod)
        yield from self._shards[0].jobs(bucket, spec.pages_per_request, cached=True, overlap=spec.overlap)
        if spec.pulls:
            yield self._shards[0].stored_job(PULL_TOKENS)

    @property
    def footprint(self) -> Footprint:
        """The most that one of the programs compiled so far needs, on each device."""
        return self._shards[0].footprint

    def jobs(self) -> Iterator[Job]:
        """What compiles the programs."""
        spec = self._spec
        for rows, queries, cached in spec.buckets:
            for shard in self._shards:
                yield from shard.jobs(
                    (rows, queries), spec.pages_per_request, cached=cached, overlap=spec.overlap
                )
        if spec.pulls:
            yield from (shard.stored_job(PULL_TOKENS) for shard in self._shards)

    def room(self, header: Header) -> int:
        """The bytes that a frame has, and not one more; see `lamina_jax.exchange.channel.Room`.

        Raises:
            ProtocolError: a frame that an engine does not send, or not now, or of another size.
        """
        if header.kind == Kind.BEGIN:
            sizes = {self._begin_bytes(bucket) for bucket in self._shapes}
            if header.length not in sizes or header.microbatch >= MOST_MICROBATCHES:
                raise ProtocolError(f"no microbatch begins with {header}")
            return header.length
        size = math.prod(self._shape(header)) * self._wire.itemsize
        shorter = self._spec.by_token and header.kind == Kind.KV
        if header.length != size and not (shorter and header.length <= size):
            raise ProtocolError(f"{header} should have {size} bytes")
        return size

    def hang_up(self) -> None:
        """Wake whoever waits for what comes by other ways than frames; from any thread."""

    def answers(self, frames: Iterable[Frame]) -> Iterator[Answer]:
        """Do what the frames say, in order; yields the answer of each query, and goes on when it is sent."""
        for header, payload in frames:
            received = time.monotonic_ns()
            if header.kind == Kind.BEGIN:
                self._begin(header, payload)
                continue
            with self._gaps.frame():
                messages = [np.asarray(part) for part in self._do(header, payload)]
                if header.kind != Kind.KV:
                    length = sum(message.nbytes for message in messages)
                    times = {"received_ns": received, "done_ns": time.monotonic_ns()}
                    yield header._replace(kind=Kind.ANSWER, length=length, **times), messages

    def is_settled(self, step: int, seconds: float) -> bool:
        """See `lamina_jax.worker.pull.Pages`."""
        return self._appends.wait(step, seconds)

    def keep_pulled(self, layer: int, slots: np.ndarray, payload: np.ndarray, tokens: int) -> None:
        """See `lamina_jax.worker.pull.Pages`."""
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(self._shards[0].pages[layer])]
        leaves = read_stored(payload, self.geometry, dtypes, tokens)
        heads = self.geometry.num_kv_heads // len(self._shards)
        for i, shard in enumerate(self._shards):
            share = [np.ascontiguousarray(leaf[:, :, i * heads : (i + 1) * heads]) for leaf in leaves]
            stored = tuple([_placed(leaf, shard.device) for leaf in share])
            with self._gaps.gap():
                shard.keep_stored(layer, _placed(slots, shard.device), stored)

    def _do(self, header: Header, payload: np.ndarray) -> list[jax.Array]:
        """What a frame of a microbatch says; the answer's messages, if there is one."""
        begun = self._begun[header.microbatch]
        parts: list[jax.Array] = []
        for shard, told, sent in zip(self._shards, begun, self._sent(header, payload), strict=True):
            match header.kind:
                case Kind.QUERY:
                    parts += shard.attend(header.layer, told, sent)
                case Kind.KV:
                    shard.append(header.layer, told, sent)
                case Kind.QKV:
                    parts += shard.append_and_attend(header.layer, told, sent)
        if header.kind != Kind.QUERY and header.layer == self.geometry.num_layers - 1:
            self._appends.end(header.microbatch)
        return parts

    def _begin(self, header: Header, payload: np.ndarray) -> None:
        numbers = payload[: header.length].view(np.int32)
        rows, queries = bucket = int(numbers[0]), int(numbers[1])
        if bucket not in self._shapes or self._begin_bytes(bucket) != header.length:
            raise ProtocolError(f"a microbatch of {bucket} was not announced: {sorted(self._shapes)} were")
        tokens, table = rows * queries, rows * self._spec.pages_per_request
        ends = np.cumsum([2, table, rows, table, tokens])
        _, tables, lens, places, positions, slots = np.split(numbers, ends)
        self._check(tables, lens)
        told = StepMetadata(
            tables.reshape(rows, -1),
            lens,
            places.reshape(rows, -1),
            positions.reshape(bucket),
            slots.reshape(bucket),
        )
        self._begun[header.microbatch] = [shard.begin(told) for shard in self._shards]
        kept = slots < self.geometry.num_pages * self.geometry.page_size
        appends = not self._spec.by_token or bool(kept.any())
        self._appends.begin(header.microbatch, header.step, appends=appends)

    def _check(self, tables: np.ndarray, lens: np.ndarray) -> None:
        """What would read beyond the pages. Slots beyond them are padding, and dropped."""
        if tables.min() < 0 or tables.max() >= self._spec.geometry.num_pages or lens.min() < 0:
            raise ProtocolError(
                f"block tables name pages {tables.min()} .. {tables.max()} of {self._spec.geometry.num_pages}"
            )

    def _shape(self, header: Header) -> tuple[int, ...]:
        """Of what a frame announces: [pieces of all devices, B, Q, heads, H].

        Raises:
            ProtocolError: an engine does not send it, or not now.
        """
        begun = self._begun.get(header.microbatch)
        shape = self._shapes[begun[0].bucket].get(header.kind) if begun else None
        if shape is None:
            raise ProtocolError(f"{header} before its microbatch has begun, or no frame of an engine")
        if header.layer >= self._spec.geometry.num_layers:
            raise ProtocolError(f"{header} is beyond the {self._spec.geometry.num_layers} layers")
        return shape

    def _begin_bytes(self, bucket: Bucket) -> int:
        rows, queries = bucket
        return 4 * (2 + rows * (2 * self._spec.pages_per_request + 1) + 2 * rows * queries)

    def _sent(self, header: Header, payload: np.ndarray) -> list[Messages]:
        """Of each device its pieces."""
        shape = self._shape(header)
        if header.length < payload.nbytes and shape[0] > 1:  # a part of the tokens, of several pieces
            payload = _spread(payload[: header.length], shape[0], payload.nbytes)
        pieces = payload.view(self._wire).reshape(shape)
        each = shape[0] // len(self._shards)
        return [
            tuple([_placed(piece, shard.device) for piece in pieces[i * each : (i + 1) * each]])
            for i, shard in enumerate(self._shards)
        ]


def _shapes(spec: WorkerSpec, rows: int, queries: int) -> dict[Kind, tuple[int, ...]]:
    """[pieces of all devices, B, Q, heads, H] of the frames of a bucket."""
    g, pieces = spec.geometry, spec.devices * spec.pieces
    kept = pieces // spec.copies
    q, kv = g.num_heads // pieces, 2 * g.num_kv_heads // kept
    return {
        kind: (count, rows, queries, heads, g.head_dim)
        for kind, count, heads in (
            (Kind.QUERY, pieces, q),
            (Kind.KV, kept, kv),
            (Kind.QKV, pieces, q + kv),
        )
    }


def _placed(piece: np.ndarray, device: jax.Device) -> jax.Array | np.ndarray:
    # On a CPU a program reads the buffer where it is, for a twentieth of what device_put costs the host.
    return piece if device.platform == "cpu" else jax.device_put(piece, device)


def _spread(payload: np.ndarray, pieces: int, size: int) -> np.ndarray:
    """The bytes of each piece at the beginning of its own equal share of `size` bytes."""
    spread = np.zeros((pieces, size // pieces), np.uint8)
    spread[:, : payload.nbytes // pieces] = payload.reshape(pieces, -1)
    return spread.reshape(-1)
