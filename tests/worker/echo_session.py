"""A session that sends every frame's payload back, for tests of who talks to it and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar
from weakref import WeakSet

import numpy as np

from lamina_jax.compilation import Footprint, Job
from lamina_jax.exchange.channel import Frame
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.spec import WorkerSpec

GEOMETRY = CacheGeometry(
    num_layers=2,
    num_pages=8,
    page_size=4,
    num_kv_heads=2,
    num_heads=4,
    head_dim=8,
    dtype="bfloat16",
    wire_dtype="float32",
)
SPEC = WorkerSpec(
    geometry=GEOMETRY,
    devices=1,
    windows=(1 << 30, 16),
    scales=(0.125, 0.3),
    softcaps=(None, 30.0),
    buckets=((4, 1, True), (1, 64, False)),
    pages_per_request=4,
    overlap=True,
    pieces=1,
    copies=1,
    by_token=False,
)
ROOM = 4096


def spec(**geometry: int) -> WorkerSpec:
    """SPEC with another geometry."""
    return replace(SPEC, geometry=replace(GEOMETRY, **geometry))


class EchoSession:
    """Compiles for ever where the spec has a page size of 1, fails to compile where it has 2; a frame of
    step 1 makes it hold Python's lock for seconds, a frame of step 2 makes it fail."""

    transfer_address = ""
    alive: ClassVar[WeakSet[EchoSession]] = WeakSet()

    def __init__(self, spec: WorkerSpec, devices: Sequence[object]) -> None:
        self.spec, self.devices, self.geometry = spec, devices, spec.geometry
        self.alive.add(self)

    footprint = Footprint(temporaries=5, results=7)

    def probe(self) -> Iterator[Job]:
        yield next(self.jobs())

    def hold(self) -> None:
        """There are no pages."""

    def jobs(self) -> Iterator[Job]:
        work = {1: self._compile_slowly, 2: self._fail}.get(self.spec.geometry.page_size, lambda: None)
        yield from ((f"job {i}", work) for i in range(64 if self.spec.geometry.page_size == 1 else 3))

    def hang_up(self) -> None:
        pass

    def room(self, header: Header) -> int:
        if header.kind is Kind.HELLO or header.length > ROOM:
            raise ProtocolError(f"{header.kind.name} of {header.length} bytes may not come here")
        return header.length

    def answers(self, frames: Iterable[Frame]) -> Iterator[tuple[Header, list[np.ndarray]]]:
        for header, payload in frames:
            if header.step == 1:
                hold_the_lock()
            if header.step == 2:
                self._fail()
            yield header._replace(kind=Kind.ANSWER), [payload[: header.length]]

    def is_settled(self, step: int, seconds: float) -> bool:
        return True

    def keep_pulled(self, layer: int, slots: np.ndarray, payload: np.ndarray, tokens: int) -> None:
        """Takes it, and forgets it."""

    def _compile_slowly(self) -> None:
        time.sleep(0.5)

    def _fail(self) -> None:
        raise RuntimeError("out of tape\nsecond line")


def hold_the_lock() -> None:
    """For some 4 s or more no other Python thread runs: this is one bytecode."""
    _ = 3**14_000_000
