"""What the engine asks of whatever executes its steps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lamina_jax.core import Sampled, StepPlan
from lamina_jax.engine.errands import Errand


@runtime_checkable
class ModelRunner(Protocol):
    """Executes step plans in the order in which they are dispatched."""

    def dispatch(self, plan: StepPlan) -> Any:
        """Queue a step; returns at once, with what `read` takes."""
        ...

    def read(self, step: Any) -> list[Sampled]:
        """Wait for a dispatched step: what came of each of its microbatches."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters of this runner, for `LLM.stats()`."""
        ...


@runtime_checkable
class ClosableRunner(ModelRunner, Protocol):
    """A runner that holds what others wait for."""

    def close(self) -> None:
        """Give it back."""
        ...


@runtime_checkable
class RecoverableRunner(ClosableRunner, Protocol):
    """A runner whose attention workers can be lost: `dispatch` and `read` then raise `WorkerLost`.

    What was in flight is not read any more, and what the pages held is gone. Nothing is dispatched until
    `recover` has succeeded; the first step after that reads no page that was written before.
    """

    def check(self) -> None:
        """Called while nothing is in flight, every now and then and before a step; returns at once.

        Raises:
            WorkerLost: a worker has been lost since.
        """
        ...

    def recover(self) -> bool:
        """Try once to get every lost worker back, for two seconds at most; whether all are there, ready.

        What takes longer (a worker that compiles) goes on between two tries.

        Raises:
            WorkerLost: they are not, and this is what is known of it now.
        """
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """Prefills prompts elsewhere, and brings their KV to the pages. All of it returns at once but `wait`.

    Attributes:
        available: whether it is worth asking now.
    """

    @property
    def available(self) -> bool: ...

    def begin(self, errand: Errand) -> None:
        """Have its KV brought."""
        ...

    def drop(self, number: int) -> None:
        """Nobody wants it any more."""
        ...

    def over(self) -> list[tuple[int, bool]]:
        """Errands that have ended since this was asked last, each with whether all was brought. Nothing is
        written for them any more. Those that were dropped are among them."""
        ...

    def wait(self, seconds: float) -> None:
        """Until some errand has ended, or so long."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters."""
        ...

    def close(self) -> None:
        """End all."""
        ...
