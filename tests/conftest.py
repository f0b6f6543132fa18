"""How every test runs: on eight virtual CPU devices, strictly, with shape annotations checked.

The settings are made before jax is imported, because its backend reads them once.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

VIRTUAL_DEVICES = 8


def _prepare_jax() -> None:
    """Give the CPU backend its virtual devices and turn on jax's strict modes.

    JAX_PLATFORMS is left alone where it is set, so that `JAX_PLATFORMS=cuda pytest -m hardware` uses the GPU.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={VIRTUAL_DEVICES}".strip()
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    session = tempfile.mkdtemp(prefix="lamina-test-")
    atexit.register(shutil.rmtree, session, ignore_errors=True)
    # Engines of the same shape are compiled once per session, by the processes that tests start, too.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(session, "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    # For those processes; this one has looked already. A worker that is killed leaves its socket behind.
    os.environ["TMPDIR"] = session


_prepare_jax()

from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["lamina_jax", "pallas_kernels"], "typechecker.check")

# One slow core must not make a property flaky.
settings.register_profile("lamina", deadline=None)
settings.load_profile("lamina")
