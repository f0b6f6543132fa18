"""The TPU kernel of paged attention: its numbers in interpret mode, its waits, and its lowering."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh
from paged_cases import Case, attend, check, make_case

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention.tpu import paged_attention_tpu


def one_case(**changes: object) -> Case:
    shape = {"B": 3, "Q": 1, "K": 2, "G": 4, "H": 128, "p": 16, "M": 6, "contexts": [0, 37, 48]}
    return make_case(0, **(shape | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"p": 8, "K": 1, "G": 5, "Q": 3, "window": 18, "worker": 1, "workers": 2},
        {"p": 32, "G": 7, "Q": 4, "H": 256, "contexts": [1, 32, 64], "M": 2, "softcap": 3.0},
    ],
    ids=str,
)
def test_float32_equals_numpy(changes: dict) -> None:
    case = one_case(**changes)
    check(case, attend(case, platform="tpu", interpret=True))


def test_bfloat16_equals_numpy_within_its_rounding() -> None:
    case = one_case(dtype=jnp.bfloat16, p=32, Q=3, window=18, softcap=3.0)
    check(case, attend(case, platform="tpu", interpret=True), tolerance=2e-2)


@pytest.mark.timeout(60)  # a semaphore that is never signalled waits for ever
def test_every_page_is_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    """Copies run beside the kernel and fresh buffers are NaN; a race is printed by JAX, not raised."""
    case = one_case(B=2, p=8, M=3, K=1, contexts=[9, 24])
    interpret = pltpu.InterpretParams(detect_races=True)
    check(case, paged_attention_tpu(*case.operands, **case.options, interpret=interpret))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("Q", "p"), [(1, 128), (4, 16)])
def test_lowers_for_tpu(dtype: type, Q: int, p: int) -> None:
    operands = one_case(dtype=dtype, Q=Q, p=p).operands
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    program = jax.jit(functools.partial(paged_attention, scale=0.1, softcap=20.0, platform="tpu"))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        lowered = program.trace(*operands).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"H": 64}, r"head dimension 64 .* multiple of 128"),
        ({"p": 12}, r"page size 12 is no multiple of 8"),
        ({"p": 8, "dtype": jnp.bfloat16}, r"page size 8 is no multiple of 16"),
        ({"dtype": jnp.float16}, r"float32 or bfloat16, got float16"),
    ],
    ids=str,
)
def test_refuses_what_does_not_fill_tiles(changes: dict, message: str) -> None:
    case = one_case(**changes)
    with pytest.raises(ValueError, match=message):
        attend(case, platform="tpu", interpret=True)
