"""What the engine asks of whatever executes its steps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lamina_jax.core import Sampled, StepPlan


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
