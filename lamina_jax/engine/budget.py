"""How the memory of each device is shared out, and how many KV pages that leaves room for.

It knows what is needed where as bytes; what programs need was asked of XLA after it had compiled them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from lamina_jax.compilation import Footprint
from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.engine.limits import Limits
from lamina_jax.memory import memory_name, memory_size


class Room(NamedTuple):
    """Memory that one budget covers: `size` bytes, of which `fraction` may be used."""

    size: int
    fraction: float

    @property
    def usable(self) -> int:
        return int(self.size * self.fraction)


class Needs(NamedTuple):
    """Bytes in one room.

    Attributes:
        weights: of the model.
        temporaries: of the programs that may run at once.
        in_flight: what programs were given and have returned, as far ahead as they are queued.
        page: of one page id, in all layers.
    """

    weights: int = 0
    temporaries: int = 0
    in_flight: int = 0
    page: int = 0

    @property
    def fixed(self) -> int:
        """Whatever the number of pages."""
        return self.weights + self.temporaries + self.in_flight

    def and_of(self, other: Needs) -> Needs:
        """Of both, in one room."""
        return Needs(*map(sum, zip(self, other, strict=True)))


Share = tuple[str, Needs]
"""The name of a room, and what one device needs there."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Rooms, what is needed in each, and the pages that they allow.

    Attributes:
        num_pages: of each part of the cache.
        page_size: tokens of a page.
    """

    num_pages: int
    page_size: int
    rooms: Mapping[str, Room]
    needs: Mapping[str, Needs]

    def table(self) -> str:
        """The budget to print, in bytes: below "usable", a column's rows add up to it."""
        columns: dict[tuple[Room, Needs], list[str]] = {}
        for name, needs in self.needs.items():  # like devices share a column
            columns.setdefault((self.rooms[name], needs), []).append(name)
        pages = f"KV cache: {self.num_pages} pages of {self.page_size} tokens"
        cells: dict[str, Callable[[Room, Needs], str]] = {
            "memory": lambda room, _: f"{room.size:,}",
            "memory_fraction": lambda room, _: f"{room.fraction:g}",
            "usable": lambda room, _: f"{room.usable:,}",
            "weights": lambda _, needs: f"{needs.weights:,}",
            "temporaries of programs": lambda _, needs: f"{needs.temporaries:,}",
            "in flight": lambda _, needs: f"{needs.in_flight:,}",
            pages: lambda _, needs: f"{self.num_pages * needs.page:,}",
            "unused": lambda room, needs: f"{room.usable - self._filled(needs):,}",
        }
        rows = [["memory budget, bytes", *(", ".join(names) for names in columns.values())]]
        for name, cell in cells.items():
            rows.append([name, *(cell(*column) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
        )

    def _filled(self, needs: Needs) -> int:
        """Bytes of a room that are spoken for."""
        return needs.fixed + self.num_pages * needs.page


def rooms_of(devices: Sequence[jax.Device], fraction: float) -> dict[str, Room]:
    """The memories of `devices`, as they are now.

    Raises:
        ConfigError: a device that does not say how much it has.
    """
    found = {memory_name(device): device for device in devices}
    return {name: Room(memory_size(device), fraction) for name, device in found.items()}


def shares_of(
    devices: Sequence[jax.Device],
    needs: Footprint,
    *,
    weights: int = 0,
    page: int = 0,
    limits: Limits,
    ahead: int,
) -> list[Share]:
    """What each of like `devices` needs.

    Args:
        needs: of the largest program.
        ahead: how many programs' results there are before the first is used.
    """
    # An accelerator runs one program after the other; a CPU device those of all microbatches, one of
    # which is of prefill, at once.
    at_once = limits.microbatches + 1 if devices[0].platform == "cpu" else 1
    each = Needs(weights, at_once * needs.temporaries, ahead * needs.results, page)
    return [(memory_name(device), each) for device in devices]


def wanted_pages(limits: Limits) -> int:
    """Pages of each part of the cache for as many sequences of full length as run at once."""
    parts = limits.workers
    requests = -(-limits.max_num_seqs // parts) if limits.partition == "requests" else limits.max_num_seqs
    return requests * _longest(limits)


def plan_budget(
    rooms: Mapping[str, Room], shares: Sequence[Share], config: EngineConfig, limits: Limits
) -> Budget:
    """As many pages as there is room for, but no more than `wanted_pages`.

    Raises:
        ConfigError: not even one request of full length fits, or not as many pages as `config.num_pages`
            asks for; the text names what to change.
    """
    needs: dict[str, Needs] = {}
    for name, share in shares:
        needs[name] = needs.get(name, Needs()).and_of(share)
    num_pages = config.num_pages or wanted_pages(limits)
    for name, need in needs.items():
        left = rooms[name].usable - need.fixed
        if need.page and config.num_pages is None:
            num_pages = min(num_pages, max(left, 0) // need.page)
        least = (config.num_pages or _longest(limits)) * need.page
        if left < least:
            raise ConfigError(_refusal(name, rooms[name], need, least, config, limits))
    return Budget(num_pages=num_pages, page_size=limits.page_size, rooms=rooms, needs=needs)


def _longest(limits: Limits) -> int:
    """Pages of each part for one request of full length."""
    longest = limits.pages_per_request
    return -(-longest // limits.workers) if limits.partition == "tokens" else longest


def _refusal(name: str, room: Room, need: Needs, least: int, config: EngineConfig, limits: Limits) -> str:
    """Why that does not fit, and the flag that changes most of it."""
    if config.num_pages is not None:
        what, change = f"--num-pages={config.num_pages}", "lower --num-pages"
    else:
        what = f"one request of --max-model-len={limits.max_model_len}"
        change = f"lower --max-model-len={limits.max_model_len}"
    programs = need.temporaries + need.in_flight
    if room.usable < need.weights:
        change = "choose a smaller model or other devices"
    elif programs > least:
        change = (
            f"lower --max-prefill-tokens={limits.max_prefill_tokens} or --max-num-seqs={limits.max_num_seqs}"
        )
    sizes = {
        "usable": room.usable,
        "weights": need.weights,
        "temporaries": need.temporaries,
        "in flight": need.in_flight,
        f"pages for {what}": least,
    }
    told = ", ".join(f"{part} {size / 2**20:,.1f} MiB" for part, size in sizes.items())
    return (
        f"the memory of {name} ({room.size / 2**20:,.1f} MiB at --memory-fraction={room.fraction:g}) is too "
        f"small: {told}; {change}, or raise --memory-fraction"
    )
