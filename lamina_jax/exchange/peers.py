"""Other processes that an engine needs: what is wrong with one, and waiting until all of them are up.

Knows nothing of what they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from lamina_jax.config import ConfigError

Report = Callable[[str, int, int], None]
"""`report(phase, done, total)`; total is 0 where it is not known."""

LOOK_SECONDS = 2.0
"""What a process may take to say that it is up."""


class PeerError(ConfigError):
    """A process that cannot be used: `address`, `reason`, and whether it may be `temporary`."""

    kind: ClassVar[str] = "process"

    def __init__(self, address: str, reason: str, *, temporary: bool = False) -> None:
        super().__init__(f"{self.kind} {address}: {reason}")
        self.address, self.reason, self.temporary = address, reason, temporary


@runtime_checkable
class Peer(Protocol):
    """A process that can be asked what it is, which raises a `PeerError` where it is not to be had."""

    @property
    def address(self) -> str: ...

    def describe(self, deadline_seconds: float) -> object: ...


def trouble(peer: Peer) -> PeerError | None:
    """Why a process is not there now, if it is not."""
    try:
        peer.describe(LOOK_SECONDS)
    except PeerError as error:
        return error
    return None


def wait_for_all(peers: Sequence[Peer], seconds: float, report: Report) -> None:
    """Return when all have answered once.

    Args:
        report: told who is still missing.

    Raises:
        PeerError: of one that waiting does not mend, or that is still missing after so many seconds.
    """
    until, pause, waiting = time.monotonic() + seconds, 0.1, peers
    while errors := {error.address: error for peer in waiting if (error := trouble(peer))}:
        for error in errors.values():
            if not error.temporary:
                raise error
        waiting = [peer for peer in waiting if peer.address in errors]
        first, names = next(iter(errors.values())), ", ".join(errors)
        report(f"waiting for {first.kind}s: {names}", len(peers) - len(waiting), len(peers))
        if time.monotonic() + pause > until:
            reason = f"{first.reason}; waited {seconds:g} s for {names}"
            raise type(first)(first.address, reason, temporary=True)
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
