"""A process of its own, because libtpu reads its flags once: `python compile_tpu_kernels.py CASES FOLDER`.

CASES is JSON, a list of {"chip": .., "dtype": .., sizes}; each answer is a line of JSON on stdout. libtpu
writes its schedules to FOLDER, where LIBTPU_INIT_ARGS says so.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llo_schedule import product_loop

from pallas_kernels import QuantizedPages, paged_attention
from pallas_kernels.paged_attention import tpu_plan

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
EIGHT_BITS = ("int8", "float8_e4m3fn", "uint8")
SIZES = {"B": 8, "Q": 1, "K": 8, "G": 4, "H": 128, "p": 128, "M": 16, "P": 256}


def main() -> None:
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    for case in cases:
        for file in folder.iterdir():
            file.unlink()
        print(json.dumps(compile_case(folder, **case)), flush=True)


def compile_case(folder: Path, chip: str, dtype: str, **changes: int) -> dict[str, Any]:
    """{"error": ..}, or what a call of these sizes takes: bytes of temporaries and of pages, bundles of the
    innermost loop per token and KV head."""
    sizes = SIZES | changes
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    operands = described(NamedSharding(mesh, PartitionSpec()), dtype, **sizes)
    program = jax.jit(functools.partial(paged_attention, scale=0.1, platform="tpu"))
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = program.trace(*operands).lower().compile()
            tokens = turn_tokens(operands[1], **sizes)
    except Exception as error:  # whatever the compiler says is the answer
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    loop = product_loop(folder, "paged_attention")
    return {
        "pages": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(operands[1])),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "bundles": loop.bundles / (tokens * sizes["K"]),
    }


def turn_tokens(pages: Any, *, Q: int, K: int, G: int, H: int, p: int, M: int, **_: int) -> int:
    """How many tokens one turn of the kernel's loop takes."""
    stored = pages.values if isinstance(pages, QuantizedPages) else pages
    blocks = tpu_plan.choose_blocks(
        tpu_plan.this_chip(),
        Q=Q,
        G=G,
        K=K,
        p=p,
        H=H,
        entries=M,
        token_bytes=2 * K * H * stored.dtype.itemsize,
    )
    return blocks.pages * p


def described(
    where: NamedSharding, dtype: str, *, B: int, Q: int, K: int, G: int, H: int, p: int, M: int, P: int
) -> tuple[Any, ...]:
    """The operands of a call, on a device that is only described."""

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    pages: Any = array(dtype, P, 2, K, p, H)
    if dtype in EIGHT_BITS:
        pages = QuantizedPages(pages, array("float32", P, 2, K, p))
    tables = array("int32", B, M), array("int32", B), array("int32", B, M), array("int32", B, Q)
    return (
        array("float32" if dtype == "float32" else "bfloat16", B, Q, K * G, H),
        pages,
        *tables,
        array("int32"),
    )


if __name__ == "__main__":
    main()
