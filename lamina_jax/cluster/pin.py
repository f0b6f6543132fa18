"""Becomes another program that is pinned to cores and does not outlive the process that started it.

`python -m lamina_jax.cluster.pin --parent PID [--cores 0-3] -- PROGRAM ARGUMENT ...` (Linux)
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from lamina_jax.config import ConfigError, indices

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by the program; returns only where that fails."""
    parser = argparse.ArgumentParser(prog="python -m lamina_jax.cluster.pin", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="end when this process, the parent, ends")
    parser.add_argument("--cores", help="run on these cores only")
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(argv)
    try:
        die_with(options.parent)
        pin(options.cores)
        os.execvp(options.program[0], options.program)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pin(cores: str | None) -> None:
    """Run this process, and the threads that it will start, on some cores only; None: as it is.

    Raises:
        ConfigError: a core that is not there, or not for this process.
    """
    check_cores(cores)
    if cores is not None:
        os.sched_setaffinity(0, indices(cores))


def check_cores(cores: str | None) -> None:
    """Raise what `pin` would raise."""
    allowed = os.sched_getaffinity(0)
    missing = set(indices(cores)) - allowed if cores is not None else None
    if missing:
        raise ConfigError(
            f"cores={cores!r}: there is no core {min(missing)} for this process; "
            f"there are {', '.join(map(str, sorted(allowed)))}"
        )


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, of that id, has ended in whatever way.

    It holds for the program that this process becomes, too, but not for processes which that starts.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it had ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
