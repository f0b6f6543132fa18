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
