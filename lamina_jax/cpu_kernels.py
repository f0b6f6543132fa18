"""Whether a CPU runs the native kernels or XLA's own operators.

Knows how the choice is made, said and remembered, and where compiled kernels are kept. Knows nothing of
what they compute. `python -m lamina_jax.cpu_kernels` compiles them, so that the first start need not.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax

from lamina_jax.config import ConfigError
from pallas_kernels.native import BuildError, load

log = logging.getLogger(__name__)

CpuKernels = Literal["auto", "native", "xla"]


def use_native(choice: CpuKernels, device: jax.Device) -> bool:
    """Whether `device` runs the native kernels; the first to ask in a process has them compiled if need be.

    Raises:
        ConfigError: they are asked for by name and cannot be had.
    """
    if choice == "xla" or device.platform != "cpu":
        return False
    missing = _missing()
    if missing and choice == "native":
        raise ConfigError(f"cpu_kernels=native: {missing}; install a C++ compiler, or leave it to auto")
    return not missing


@functools.cache
def _missing() -> str:
    """Why the native kernels cannot be had; empty where they can."""
    try:
        load()
    except BuildError as error:
        log.info("kernels of the CPU: XLA's, which are slower (%s)", error)
        return str(error)
    log.info("kernels of the CPU: native")
    return ""


if __name__ == "__main__":
    missing = _missing()
    print(f"kernels of the CPU: {f'those of XLA ({missing})' if missing else 'native'}")
