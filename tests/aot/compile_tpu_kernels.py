"""A process of its own, because libtpu reads its flags once: `python compile_tpu_kernels.py CASES FOLDER`.

CASES is JSON, a list of {"kernel": .., "chip": .., "dtype": .., sizes}; each answer is a line of JSON on
stdout. libtpu writes its schedules to FOLDER, where LIBTPU_INIT_ARGS says so.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llo_schedule import product_loop

from pallas_kernels import QuantizedPages, append_kv, paged_attention
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
# More than any VMEM has: XLA would copy fewer pages there and back, and call nothing of it temporary.
APPEND_SIZES = {"T": 32, "K": 8, "H": 128, "p": 128, "P": 1024}


def main() -> None:
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    for case in cases:
        for file in folder.iterdir():
            file.unlink()
        print(json.dumps(compile_case(folder, **case)), flush=True)


def compile_case(folder: Path, kernel: str, chip: str, dtype: str, **changes: int) -> dict[str, Any]:
    """{"error": ..}, or what a call of these sizes takes: bytes of temporaries and of pages; of attention the
    bundles of the innermost loop per token and KV head, too."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    array = functools.partial(described, NamedSharding(mesh, PartitionSpec()))
    compile_kernel = attention if kernel == "attention" else append
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return compile_kernel(array, folder, dtype, **changes)
    except Exception as error:  # whatever the compiler says is the answer
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


Array = Callable[..., jax.ShapeDtypeStruct]


def append(array: Array, folder: Path, dtype: str, **changes: int) -> dict[str, Any]:
    sizes = APPEND_SIZES | changes
    T, K, H = (sizes[name] for name in "TKH")
    pages = pages_of(array, dtype, **{name: sizes[name] for name in "PKpH"})
    new = array(float_dtype(dtype), T, K, H)
    program = jax.jit(functools.partial(append_kv, platform="tpu"), donate_argnums=0)
    return memory(program.trace(pages, new, new, array("int32", T)).lower().compile(), pages)


def attention(array: Array, folder: Path, dtype: str, **changes: int) -> dict[str, Any]:
    sizes = SIZES | changes
    B, Q, M, K, G, H = (sizes[name] for name in "BQMKGH")
    pages = pages_of(array, dtype, **{name: sizes[name] for name in "PKpH"})
    tables = array("int32", B, M), array("int32", B), array("int32", B, M), array("int32", B, Q)
    operands = array(float_dtype(dtype), B, Q, K * G, H), pages, *tables, array("int32")
    program = jax.jit(functools.partial(paged_attention, scale=0.1, platform="tpu"))
    answer = memory(program.trace(*operands).lower().compile(), pages)
    bundles = product_loop(folder, "paged_attention").bundles
    return answer | {"bundles": bundles / (turn_tokens(pages, **sizes) * K)}


def memory(compiled: jax.stages.Compiled, pages: Any) -> dict[str, Any]:
    return {
        "pages": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pages)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
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
        itemsize=stored.dtype.itemsize,
    )
    return blocks.pages * p


def described(where: NamedSharding, dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    """An array on a device that is only described."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)


def pages_of(array: Array, dtype: str, *, P: int, K: int, p: int, H: int) -> Any:
    pages = array(dtype, P, 2, K, p, H)
    return QuantizedPages(pages, array("float32", P, 2, K, p)) if dtype in EIGHT_BITS else pages


def float_dtype(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"


if __name__ == "__main__":
    main()
