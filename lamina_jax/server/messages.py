"""What the server and the engine say to each other: plain data, so that they may be two processes.

A call is one HTTP request; it has one engine request for each of its prompts, `request_id(call, index)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamina_jax.core import RequestOutput, SamplingParams
from lamina_jax.weights.chat_template import ChatTemplate

Prompt = str | list[int]


@dataclass(frozen=True)
class Submit:
    """Continue these prompts: all of them, or none.

    `special_tokens`: whether the tokenizer puts its own around a text; `echo`: whether `Accepted` says the
    prompts as text.
    """

    call_id: str
    prompts: list[Prompt]
    sampling: SamplingParams
    special_tokens: bool = True
    echo: bool = False


@dataclass(frozen=True)
class Abort:
    """End whatever still runs of a call with `count` prompts. No answer follows."""

    call_id: str
    count: int


@dataclass(frozen=True)
class AskStats:
    """Answered by `Stats`."""


@dataclass(frozen=True)
class Stop:
    """End the engine's loop."""


Message = Submit | Abort | AskStats | Stop


@dataclass(frozen=True)
class Progress:
    """How far the engine's start is; `total` is 0 where it is not known."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The engine takes calls from now on. Without a chat template it takes no conversations."""

    stats: dict[str, Any]
    chat_template: ChatTemplate | None = None


@dataclass(frozen=True)
class Died:
    """The engine will answer nothing any more."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """An attention worker is lost. What ran has ended with an error, what waits waits until `Recovered`.

    Comes again when there is more to say about it.
    """

    worker: str
    reason: str


@dataclass(frozen=True)
class Recovered:
    """No worker is lost any more."""


@dataclass(frozen=True)
class Accepted:
    """Every prompt of a call waits or runs. `echo`: for each prompt, the text of each of its tokens."""

    call_id: str
    echo: list[list[str]]


@dataclass(frozen=True)
class Rejected:
    """No prompt of a call runs; `too_long` says that one does not fit the model's context."""

    call_id: str
    reason: str
    too_long: bool


@dataclass(frozen=True)
class Outputs:
    """The continuations that a step has changed, each as a whole."""

    outputs: list[RequestOutput]


@dataclass(frozen=True)
class Stats:
    """`Engine.stats()`, between two steps."""

    values: dict[str, Any]


Event = Progress | Ready | Died | Lost | Recovered | Accepted | Rejected | Outputs | Stats


def request_id(call_id: str, index: int) -> str:
    return f"{call_id}-{index}"


def call_and_index(request_id: str) -> tuple[str, int]:
    """The inverse of `request_id`."""
    call_id, _, index = request_id.rpartition("-")
    return call_id, int(index)
