"""What the tests on a device share. They need no package of the server's."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels.paged_attention import PLATFORMS


@pytest.fixture(scope="session")
def platform() -> str:
    """The reading of paged attention that is written for this machine's device."""
    device = jax.devices()[0]
    if device.platform == "cpu" or device.platform not in PLATFORMS:
        pytest.skip(f"JAX has no GPU and no TPU here, but {device}: see docs/hardware.md")
    return device.platform
