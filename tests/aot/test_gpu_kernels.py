"""The GPU's kernels compile to machine code for GPUs that are not there, and keep within their registers."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lamina_jax.aot.devices import Topology
from lamina_jax.aot.measure import registers
from lamina_jax.aot.worker import missing, ptxas
from pallas_kernels import QuantizedPages, paged_attention

pytestmark = [pytest.mark.aot, pytest.mark.timeout(300)]

GPUS = ["a100", "h20", "h100", "l40s", "b200"]
SHAPE = {"B": 8, "Q": 1, "K": 8, "G": 8, "H": 128, "p": 64, "M": 64}
CHUNK = {"Q": 64, "G": 4}
EIGHT_BITS = ("int8", "float8_e4m3fn", "uint8")

PARAMETERS = [
    *((gpu, dtype, {}) for gpu in GPUS for dtype in ("float32", "bfloat16", "int8", "uint8")),
    # An A100 has no such type.
    *((gpu, "float8_e4m3fn", {}) for gpu in GPUS if gpu != "a100"),
    # What needs most shared memory, on the GPU with the least; and most registers.
    *(("l40s", dtype, CHUNK) for dtype in ("float32", "bfloat16", "uint8")),
    *(("h100", dtype, CHUNK | {"H": 256}) for dtype in ("bfloat16", "int8")),
    ("h100", "bfloat16", {"Q": 3, "G": 5, "H": 80, "p": 24}),
    ("h100", "bfloat16", {"H": 64}),
    ("l40s", "bfloat16", {"H": 256}),
]


@pytest.mark.parametrize(("gpu", "dtype", "changes"), PARAMETERS, ids=str)
def test_paged_attention_compiles_without_spills(gpu: str, dtype: str, changes: dict, tmp_path: Path) -> None:
    if lacking := missing("cuda"):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    (device,) = Topology(f"{gpu}:1").devices()
    program = jax.jit(functools.partial(paged_attention, scale=0.1, platform="gpu"))
    operands = described(device, dtype, **(SHAPE | changes))
    lowered = program.trace(*operands).lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})

    needed = registers(tmp_path.glob("*.ptx"), ptxas())
    assert needed.registers is not None
    assert needed.spilled == 0, needed


def test_the_layers_of_one_program_plan_once() -> None:
    """As in a collocated step: XLA finds that all layers with one window sort the same edges."""
    if lacking := missing("cuda"):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    (device,) = Topology("h100:1").devices()

    @jax.jit
    def step(q: jax.Array, pages: jax.Array, *where: jax.Array) -> jax.Array:
        *lengths, _ = where
        for window in (2**30, 100, 2**30, 100):
            q, _ = paged_attention(q, pages, *lengths, window, scale=0.1, platform="gpu")
        return q

    operands = described(device, "bfloat16", **SHAPE)
    compiled = step.trace(*operands).lower(lowering_platforms=("cuda",)).compile()
    assert compiled.as_text().count(" sort(") == 2


def described(
    device: jax.Device, dtype: str, *, B: int, Q: int, K: int, G: int, H: int, p: int, M: int
) -> tuple[jax.ShapeDtypeStruct | QuantizedPages, ...]:
    """The operands of a call, on a device that is only described."""

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    values: jax.ShapeDtypeStruct | QuantizedPages = array(dtype, B * M, 2, K, p, H)
    if dtype in EIGHT_BITS:
        values = QuantizedPages(values, array("float32", B * M, 2, K, p))
    return (
        array("float32" if dtype == "float32" else "bfloat16", B, Q, K * G, H),
        values,
        array("int32", B, M),
        array("int32", B),
        array("int32", B, M),
        array("int32", B, Q),
        array("int32"),
    )
