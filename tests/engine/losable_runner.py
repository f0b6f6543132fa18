"""A runner whose attention worker the test kills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina_jax.core import Sampled, StepPlan, WorkerLost
from lamina_jax.engine.runner import ModelRunner

WORKER = "10.0.0.7:7101"


class LosableRunner:
    """Passes everything on to a runner that forgets everything when its worker is lost.

    It checks the contract of `RecoverableRunner` on the way.

    Args:
        make: a runner, at the start and after each loss.
    """

    def __init__(self, make: Callable[[], ModelRunner]) -> None:
        self._make, self.inner = make, make()
        self.lost = False
        self.losses = self.tries = 0
        self._dies_at: str | None = None
        self._tries_missing = 0

    def kill(self, at: str, *, tries: int = 1) -> None:
        """The worker is found dead at the next call of this name, and is back at that many tries."""
        self._dies_at, self._tries_missing = at, tries

    def revive(self) -> None:
        """The next try succeeds; a worker that has not been found dead is not."""
        self._dies_at, self._tries_missing = None, 1

    def dispatch(self, plan: StepPlan) -> Any:
        self._look("dispatch")
        return self.losses, self.inner.dispatch(plan)

    def read(self, step: Any) -> list[Sampled]:
        losses, dispatched = step
        assert losses == self.losses, "a step is read that was lost"
        sampled = self.inner.read(dispatched)
        self._look("read")
        return sampled

    def check(self) -> None:
        self._look("check")

    def close(self) -> None:
        self._look("close")

    def recover(self) -> bool:
        assert self.lost, "there is nothing to recover from"
        self.tries += 1
        self._tries_missing -= 1
        if self._tries_missing > 1:
            return False
        if self._tries_missing == 1:
            raise WorkerLost(WORKER, "it is not ready yet")
        self.lost, self.inner = False, self._make()
        return True

    def stats(self) -> dict[str, Any]:
        return self.inner.stats()

    def _look(self, call: str) -> None:
        assert not self.lost, f"{call} while the worker is lost"
        if call == self._dies_at:
            self._dies_at, self.lost = None, True
            self.losses += 1
            raise WorkerLost(WORKER, f"its connection broke at {call}")
