"""Arrays over the devices of one host or of several, of which each process reaches its own alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from lamina_jax.config import ConfigError


def placed(arrays: Any, sharding: Sharding) -> Any:
    """Host arrays, a tree of them, as every process has them, on `sharding`.

    Over several processes each puts its own shards and waits for no other; `jax.device_put` would run a
    collective there, to compare what they were given.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index], array.dtype)

    return jax.tree.map(lambda array: place(np.asarray(array)), arrays)


def of_all_hosts(local: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices that every host of the JAX world has in the places of `local`, which are this host's.

    Raises:
        ConfigError: a host that has fewer.
    """
    platform = local[0].platform
    own = jax.local_devices(backend=platform)
    places = [own.index(device) for device in local]
    found = []
    for host in range(jax.process_count()):
        theirs = jax.local_devices(process_index=host, backend=platform)
        if len(theirs) <= max(places):
            raise ConfigError(
                f"compute host {host} has {len(theirs)} {platform} devices, this one takes {platform}:"
                f"{max(places)}: choose like compute_devices on all hosts"
            )
        found += [theirs[place] for place in places]
    return found
