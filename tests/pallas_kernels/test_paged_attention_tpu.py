"""The TPU kernel of paged attention: its numbers in interpret mode, its waits, and its lowering."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh
from paged_cases import Case, cases, check, make_case

from pallas_kernels import QuantizedPages, paged_attention
from pallas_kernels.paged_attention.tpu import paged_attention_tpu
from pallas_kernels.paged_attention.tpu_plan import Chip, choose_blocks

SHORT_RING = Chip(bytes_per_s=1.0)


def one_case(**changes: object) -> Case:
    shape = {"B": 3, "Q": 1, "K": 2, "G": 4, "H": 128, "p": 64, "M": 2, "contexts": [0, 37, 128]}
    return make_case(0, **(shape | changes))


def attend(
    case: Case, chip: Chip = SHORT_RING, pages: QuantizedPages | None = None
) -> tuple[jax.Array, jax.Array]:
    program = jax.jit(functools.partial(paged_attention_tpu, **case.options, chip=chip, interpret=True))
    q, own_pages, *where = case.operands
    return program(q, own_pages if pages is None else pages, *where)


def quantized(case: Case, dtype: str) -> tuple[Case, QuantizedPages]:
    """Pages of any bits, NaN where the case's are, and the case with the numbers that they mean."""
    rng = np.random.default_rng(1)
    stored = jnp.asarray(rng.integers(0, 256, case.pages.shape).astype(np.uint8))
    cached = np.isfinite(case.pages)
    if dtype == "int8":
        values = jax.lax.bitcast_convert_type(stored, jnp.int8)
        floats = values.astype(jnp.float32)
    else:
        # 0x7F and 0xFF are NaN: only beyond the context.
        stored = jnp.where(cached & (stored % 128 == 127), jnp.uint8(128), stored)
        values = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
        floats = values.astype(jnp.float32)
    scales = np.where(cached[..., 0], rng.uniform(0.5, 1.5, cached.shape[:-1]) / 100, np.nan)
    scales = scales.astype(np.float32)
    held = dataclasses.replace(case, pages=np.where(cached, floats * scales[..., None], np.nan))
    return held, QuantizedPages(stored if dtype == "uint8" else values, jnp.asarray(scales))


@pytest.mark.parametrize(
    ("changes", "chip"),
    [
        # Two heads share rows, and the ring comes round.
        ({"p": 16, "M": 8, "G": 3, "contexts": [1, 0, 128]}, SHORT_RING),
        # Tokens in lanes, and two cores with an odd number of items.
        ({"H": 64, "p": 128, "G": 2, "window": 30}, Chip(cores=2)),
        # Query tokens in tiles that do not come out even.
        ({"K": 1, "G": 5, "Q": 19, "window": 18, "softcap": 3.0}, Chip(vmem_bytes=11 << 16)),
    ],
    ids=["rows shared", "tokens in lanes", "tiles of queries"],
)
def test_float32_equals_numpy(changes: dict, chip: Chip) -> None:
    case = one_case(**changes)
    check(case, attend(case, chip))


@pytest.mark.parametrize(
    ("dtype", "fp8"), [("int8", None), ("uint8", "float8_e4m3b11fnuz"), ("float8_e4m3fn", None)], ids=str
)
def test_8_bits_equal_numpy(dtype: str, fp8: str | None) -> None:
    case, pages = quantized(one_case(B=2, G=3, contexts=[37, 64]), dtype)
    check(case, attend(case, SHORT_RING._replace(fp8=fp8), pages), tolerance=2e-2)


@pytest.mark.slow
def test_bfloat16_equals_numpy_within_its_rounding() -> None:
    case = one_case(dtype=jnp.bfloat16, Q=3, window=18, softcap=3.0)
    check(case, attend(case), tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.timeout(600)  # every example is compiled
@settings(max_examples=10)
@given(data=st.data())
def test_any_shape_equals_numpy(data: st.DataObject) -> None:
    shape = {
        "B": data.draw(st.integers(1, 4)),
        "Q": data.draw(st.integers(1, 9)),
        "K": data.draw(st.sampled_from([1, 2, 3, 8])),
        "G": data.draw(st.sampled_from([1, 2, 3, 5, 7, 8, 16])),
        "H": data.draw(st.sampled_from([64, 80, 96, 128, 256])),
        "p": data.draw(st.sampled_from([16, 32, 64, 128, 256])),
        "M": data.draw(st.integers(1, 5)),
    }
    if shape["H"] % 128:
        shape["p"] = max(shape["p"], 128)
    chip = Chip(
        cores=data.draw(st.integers(1, 2)),
        # As little as two of the shortest turns need: queries come in tiles then.
        vmem_bytes=data.draw(
            st.sampled_from([math.lcm(shape["p"], 128) * shape["K"] * shape["H"] * 43, 32 << 20])
        ),
        bytes_per_s=data.draw(st.sampled_from([1.0, 1e12])),
    )
    case = data.draw(cases(shape))
    check(case, attend(case, chip))


@pytest.mark.slow
@pytest.mark.timeout(300)  # a semaphore that is never signalled waits for ever
@pytest.mark.parametrize("cores", [1, 2])
def test_every_page_is_waited_for(cores: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Copies run beside the kernel and fresh buffers are NaN; a race is printed by JAX, not raised."""
    case = one_case(B=4, M=3, K=1, contexts=[9, 0, 130, 64])
    interpret = pltpu.InterpretParams(detect_races=True)
    chip = SHORT_RING._replace(cores=cores)
    check(case, paged_attention_tpu(*case.operands, **case.options, chip=chip, interpret=interpret))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(("dtype", "Q", "p"), [(jnp.float32, 1, 128), (jnp.bfloat16, 4, 16)])
def test_lowers_for_tpu(dtype: type, Q: int, p: int) -> None:
    operands = one_case(dtype=dtype, Q=Q, p=p, contexts=[0, 0, 0]).operands
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    program = jax.jit(functools.partial(paged_attention, scale=0.1, softcap=20.0, platform="tpu"))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        lowered = program.trace(*operands).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"H": 64}, r"one must be a multiple of 128"),
        ({"H": 40, "p": 128}, r"head dimension 40 is no multiple of 16"),
        ({"p": 12}, r"page size 12 is no multiple of 8"),
        ({"p": 8, "dtype": jnp.bfloat16}, r"page size 8 is no multiple of 16"),
        ({"dtype": jnp.float16}, r"pages must be float32, .*, got float16"),
    ],
    ids=str,
)
def test_refuses_what_does_not_fill_tiles(changes: dict, message: str) -> None:
    case = one_case(**changes, contexts=[0, 0, 0])
    with pytest.raises(ValueError, match=message):
        paged_attention(*case.operands, **case.options, platform="tpu", interpret=True)


def test_8_bit_pages_are_at_least_64_tokens() -> None:
    case, pages = quantized(one_case(p=32, contexts=[0, 0, 0]), "int8")
    with pytest.raises(ValueError, match=r"page size 32 is no multiple of 64, which int8 pages need"):
        attend(case, pages=pages)


@given(
    Q=st.integers(1, 2000), G=st.integers(1, 16), K=st.integers(1, 40), pages=st.integers(1, 300),
    p=st.sampled_from([8, 16, 48, 64, 80, 128, 256]), H=st.sampled_from([64, 128, 256]),
    itemsize=st.sampled_from([1, 2, 4]), vmem=st.sampled_from([16, 64, 128]),
)  # fmt: skip
def test_blocks_fill_tiles_cover_the_queries_and_fit(
    Q: int, G: int, K: int, pages: int, p: int, H: int, itemsize: int, vmem: int
) -> None:
    chip = Chip(vmem_bytes=vmem << 20)
    shape = {"Q": Q, "G": G, "K": K, "p": p, "H": H, "entries": pages, "itemsize": itemsize}
    shortest = 2 * math.lcm(p, 128) * 2 * K * H * itemsize
    try:
        blocks = choose_blocks(chip, **shape)
    except ValueError as error:
        assert shortest * 3 > chip.vmem_bytes // 4, error  # with their scales
        return
    assert 1 <= blocks.tokens <= Q
    assert K % blocks.heads == 0
    assert blocks.rows % 8 == 0
    assert 0 <= blocks.rows - blocks.heads * blocks.tokens * G < 8
    assert blocks.pages * p % 128 == 0
    assert 2 <= blocks.depth <= 8
    assert blocks.depth * blocks.pages * p * 2 * K * H * itemsize <= chip.vmem_bytes * 5 // 8


def test_pages_too_large_for_vmem_are_refused() -> None:
    with pytest.raises(ValueError, match=r"page size 1000: 2 turns of 16000 tokens with 8 KV heads of 128"):
        choose_blocks(Chip(), Q=1, G=4, K=8, p=1000, H=128, entries=4, itemsize=2)
