"""Compiling before ready: every program is compiled ahead of time, in parallel, and counted."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

Job = tuple[str, Callable[[], object]]
"""A program to be compiled: its name, and the call that compiles it."""


class Footprint(NamedTuple):
    """Bytes on each device that a program needs beside its arguments while it runs.

    Attributes:
        temporaries: given back when it ends.
        results: what it returns, but for arguments that were given up for it.
    """

    temporaries: int
    results: int


class Compilation:
    """A function compiled once for given shapes, then called without tracing.

    Args:
        function: pure, of pytrees of arrays.
        inputs: its arguments as ShapeDtypeStructs with shardings.
        donate: which arguments are given up.
        out: shardings of what it returns, a prefix of it; None: as they come.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: tuple[Any, ...],
        donate: tuple[int, ...] = (),
        out: Any = None,
    ) -> None:
        self._function, self._inputs, self._donate, self._out = function, inputs, donate, out
        self.compiled: Any = None

    def compile(self) -> Any:
        """Lower and compile; may run in any thread. Returns the `jax.stages.Compiled`."""
        program = jax.jit(self._function, donate_argnums=self._donate, out_shardings=self._out)
        self.compiled = program.lower(*self._inputs).compile()
        return self.compiled

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    def shapes(self, place: jax.sharding.Sharding) -> Any:
        """What it returns, as ShapeDtypeStructs, all on `place`."""
        shapes = jax.eval_shape(self._function, *self._inputs)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)

    def num_bytes(self, argument: int) -> int:
        """Of one of its arguments."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._inputs[argument]))

    @property
    def footprint(self) -> Footprint:
        """What XLA says of the compiled program."""
        told = self.compiled.memory_analysis()
        return Footprint(told.temp_size_in_bytes, told.output_size_in_bytes - told.alias_size_in_bytes)


def largest(programs: Iterable[Compilation]) -> Footprint:
    """The most that any of the compiled `programs` needs."""
    footprints = [program.footprint for program in programs if program.compiled is not None]
    return Footprint(*(max(sizes) for sizes in zip(Footprint(0, 0), *footprints, strict=True)))


class Compiled(NamedTuple):
    """What compiling took: programs, those of them that the persistent cache had, and seconds."""

    programs: int
    from_cache: int
    seconds: float

    def and_then(self, other: Compiled) -> Compiled:
        """Of both, one after the other."""
        return Compiled(
            self.programs + other.programs, self.from_cache + other.from_cache, self.seconds + other.seconds
        )

    def __str__(self) -> str:
        new = self.programs - self.from_cache
        return (
            f"compiled {self.programs} programs: {self.from_cache} from the cache, {new} new, "
            f"in {self.seconds:.1f} s"
        )


def compile_all(jobs: Iterable[Job], report: Callable[[int, int], None]) -> Compiled:
    """Compile in as many threads as this process has cores; `report(done, total)` after each program."""
    started, counter = time.monotonic(), CompilationCounter()
    waiting = list(jobs)
    report(0, len(waiting))
    pool = ThreadPoolExecutor(num_cores())
    try:
        futures = [pool.submit(compile_one) for _, compile_one in waiting]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            report(done, len(waiting))
    finally:
        # After an error, programs that are being compiled are not waited for: each can take minutes.
        pool.shutdown(wait=False, cancel_futures=True)
    return Compiled(counter.count, counter.from_cache, time.monotonic() - started)


@contextmanager
def no_collections() -> Iterator[None]:
    """Leave garbage in cycles where it is: tracing makes millions of objects that are needed, and looking
    for cycles among them again and again takes a seventh of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def num_cores() -> int:
    """Cores that this process may use: those it is pinned to, where it is."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class CompilationCounter:
    """Counts the programs that this process asks XLA for, from when it is made, as long as it is held.

    Attributes:
        count: programs, compiled or found in the persistent cache.
        from_cache: of them, those that were found.
    """

    def __init__(self) -> None:
        asked: list[str] = []
        found: list[str] = []
        self._asked, self._found = asked, found

        def listen_to_durations(event: str, duration_secs: float, **_: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                asked.append(event)

        def listen(event: str, **_: str | int) -> None:
            if event == "/jax/compilation_cache/cache_hits":
                found.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen_to_durations)
        jax.monitoring.register_event_listener(listen)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, listen_to_durations)
        weakref.finalize(self, jax.monitoring.unregister_event_listener, listen)

    @property
    def count(self) -> int:
        return len(self._asked)

    @property
    def from_cache(self) -> int:
        return len(self._found)
