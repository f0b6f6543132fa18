"""One compute host of several that loads its share of a checkpoint, checks it, and ends.

python load_weights.py COORDINATOR NUM_HOSTS HOST_ID DEVICES FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from lamina_jax.engine.placement import place_weight
from lamina_jax.models import Storage, build
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.loader import Read, TensorSpec, load_model


def main(coordinator: str, num_hosts: str, host_id: str, devices: str, folder: str) -> None:
    """`devices`: of each host."""
    logging.basicConfig(level=logging.INFO)
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.distributed.initialize(coordinator, int(num_hosts), int(host_id), initialization_timeout=60)
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    whole = load_file(Path(folder) / "model.safetensors")

    def place(spec: TensorSpec, read: Read) -> jax.Array:
        array = place_weight(spec, read, mesh=mesh)
        expected = whole[spec.name].T if spec.transpose else whole[spec.name]
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
        return array

    load_model(Path(folder), build(read_config(Path(folder)), Storage(np.dtype("float32"), "in_out")), place)


if __name__ == "__main__":
    main(*sys.argv[1:])
