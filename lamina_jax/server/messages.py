"""What the server and the engine say to each other: plain data, which `frames` takes from process to process.

A call is one HTTP request; it has one engine request for each of its prompts, `request_id(call, index)`.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from lamina_jax.config import EngineConfig
from lamina_jax.core import RequestOutput, SamplingParams


class Start(Struct, frozen=True, tag=True):
    """The first message to an engine's process: what it is to be.

    `cores`: those that it runs on, such as "0-3", None: any; `cluster`: the cluster file that it is of;
    `log_format`: that of the server's log.
    """

    config: EngineConfig
    cores: str | None = None
    cluster: str | None = None
    log_format: Literal["text", "json"] = "text"


class Submit(Struct, frozen=True, tag=True):
    """Continue these prompts, each a list of token ids: all of them, or none."""

    call_id: str
    prompts: list[list[int]]
    sampling: SamplingParams


class Abort(Struct, frozen=True, tag=True):
    """End whatever still runs of a call with `count` prompts. No answer follows."""

    call_id: str
    count: int


class AskStats(Struct, frozen=True, tag=True):
    """Answered by `Stats`."""


class Stop(Struct, frozen=True, tag=True):
    """End the engine's loop, and give back what it holds."""


Message = Submit | Abort | AskStats | Stop


class Progress(Struct, frozen=True, tag=True):
    """How far the engine's start is; `total` is 0 where it is not known."""

    phase: str
    done: int
    total: int


class Ready(Struct, frozen=True, tag=True):
    """The engine takes calls from now on. `stats` are `Engine.stats()`."""

    stats: dict[str, Any]


class Died(Struct, frozen=True, tag=True):
    """The engine will answer nothing any more."""

    reason: str


class Lost(Struct, frozen=True, tag=True):
    """An attention worker is lost. What ran has ended with an error, what waits waits until `Recovered`.

    Comes again when there is more to say about it.
    """

    worker: str
    reason: str


class Recovered(Struct, frozen=True, tag=True):
    """No worker is lost any more."""


class Alive(Struct, frozen=True, tag=True):
    """The engine's process runs, whatever it does at the time; it says so time and again."""


class Accepted(Struct, frozen=True, tag=True):
    """Every prompt of a call waits or runs."""

    call_id: str


class Rejected(Struct, frozen=True, tag=True):
    """No prompt of a call runs: so many others wait, or it can never be served."""

    call_id: str
    reason: str
    queue_full: bool


class Outputs(Struct, frozen=True, tag=True):
    """What is new of the continuations that a step has changed."""

    outputs: list[RequestOutput]


class Stats(Struct, frozen=True, tag=True):
    """`Engine.stats()`, between two steps."""

    values: dict[str, Any]


Event = Progress | Ready | Died | Lost | Recovered | Alive | Accepted | Rejected | Outputs | Stats


def request_id(call_id: str, index: int) -> str:
    return f"{call_id}-{index}"


def call_and_index(request_id: str) -> tuple[str, int]:
    """The inverse of `request_id`."""
    call_id, _, index = request_id.rpartition("-")
    return call_id, int(index)
