"""The GPU kernel of paged attention: its numbers in interpret mode, its plan of splits, and its lowering."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec
from paged_cases import NO_WINDOW, Case, attend, cases, check, make_case, quantized, shapes

from pallas_kernels import QuantizedPages, paged_attention, split_plan
from pallas_kernels.paged_attention.gpu import choose_tiling
from pallas_kernels.paged_attention.gpu_merge import PARTS_AT_A_TIME, merge_parts
from pallas_kernels.paged_attention.gpu_plan import SplitPlan, plan_splits

SHAPE = {"B": 3, "Q": 1, "K": 2, "G": 4, "H": 16, "p": 64, "M": 5}
EIGHT_BITS = [np.int8, ml_dtypes.float8_e4m3fn, np.uint8]


def one_case(**changes: object) -> Case:
    return make_case(0, **(SHAPE | {"contexts": [0, 197, 320]} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"p": 4, "M": 40, "Q": 2, "G": 5, "H": 80, "contexts": [0, 130, 160], "worker": 1, "workers": 3},
        {"Q": 18, "G": 7, "K": 1, "window": 70, "softcap": 3.0},
    ],
    ids=str,
)
def test_float32_equals_numpy(changes: dict) -> None:
    case = one_case(**changes)
    check(case, attend(case, platform="gpu", interpret=True))


def test_any_context_window_and_worker_equals_numpy() -> None:
    program = jax.jit(functools.partial(paged_attention, scale=0.25, platform="gpu", interpret=True))

    @settings(max_examples=30)
    @given(case=cases(SHAPE | {"p": 24, "M": 8}))
    def equals_numpy(case: Case) -> None:
        check(case, program(*case.operands))

    equals_numpy()
    assert program._cache_size() == 1


@pytest.mark.slow
@pytest.mark.timeout(580)  # every example compiles
@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_equals_numpy(data: st.DataObject) -> None:
    shape = data.draw(shapes()) | {"H": data.draw(st.sampled_from([16, 64, 80, 96, 128, 256]))}
    stored = data.draw(st.sampled_from([np.float32, jnp.bfloat16, np.float16, *EIGHT_BITS]))
    is_quantized = stored in EIGHT_BITS
    case = data.draw(cases(shape, np.float32 if is_quantized else stored))
    case = dataclasses.replace(case, softcap=data.draw(st.sampled_from([None, 3.0])))
    case = quantized(case, stored) if is_quantized else case
    tolerance = 1e-5 if stored == np.float32 else 2e-2
    check(case, attend(case, platform="gpu", interpret=True), tolerance=tolerance)


def test_uint16_pages_are_bit_patterns() -> None:
    case = one_case(dtype=jnp.bfloat16)
    stored = dataclasses.replace(case, pages=case.pages.view(np.uint16))
    check(case, attend(stored, platform="gpu", interpret=True, dtype=jnp.bfloat16), tolerance=2e-2)


@pytest.mark.parametrize("stored", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantised_pages_equal_numpy(stored: type) -> None:
    case = quantized(one_case(softcap=3.0, window=150), stored)
    check(case, attend(case, platform="gpu", interpret=True), tolerance=2e-2)


def test_every_float8_is_read_exactly() -> None:
    """One cached token per request: o is its v, so that no sum hides a wrong bit; the 2 NaNs left out."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F] + [0, 0], np.uint8)
    values = np.tile(codes.reshape(4, 1, 1, 1, 64), (1, 2, 1, 1, 1))  # [4 2 1 1 64]
    pages = QuantizedPages(values, np.ones((4, 2, 1, 1), np.float32))
    case = make_case(0, B=4, Q=1, K=1, G=1, H=64, p=1, M=1, contexts=[1] * 4)
    case = dataclasses.replace(case, pages=pages, block_tables=np.arange(4, dtype=np.int32)[:, None])
    o, _ = attend(case, platform="gpu", interpret=True)
    want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(4, 1, 1, 64)
    np.testing.assert_array_equal(o, want)


def test_large_scores() -> None:
    """Integers, so that float32 scores up to 10^6 are exact: only a lost maximum can go wrong."""
    case = one_case(contexts=[5, 197, 320])
    case = dataclasses.replace(
        case, q=np.round(case.q * 200), pages=np.round(case.pages * 200) * np.float32(1), scale=1.0
    )
    check(case, attend(case, platform="gpu", interpret=True))


def test_heads_on_several_devices() -> None:
    case = one_case(Q=2)
    cached_part = functools.partial(paged_attention, **case.options, platform="gpu", interpret=True)
    heads, everywhere = PartitionSpec(None, None, "kv"), PartitionSpec()
    sharded = jax.shard_map(
        cached_part,
        mesh=Mesh(np.array(jax.devices()[:2]), ("kv",)),
        in_specs=(heads, heads, *(everywhere,) * 5),
        out_specs=(heads, heads),
    )
    check(case, jax.jit(sharded)(*case.operands))


def test_a_plan_made_beforehand_serves() -> None:
    """Made from shapes, for one of several windows of the same program."""
    interpreted = {"platform": "gpu", "interpret": True}
    layer = jax.jit(functools.partial(paged_attention, **one_case().options, **interpreted))
    for window, contexts in ((NO_WINDOW, [0, 0, 130]), (70, [0, 197, 320]), (1, [5, 64, 65])):
        case = one_case(window=window, contexts=contexts)
        q, pages, _, *where = case.operands
        shapes = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, pages))
        plan = jax.jit(functools.partial(split_plan, *shapes, **interpreted))(*where)
        check(case, layer(*case.operands, plan=plan))


def test_a_plan_that_does_not_fit_is_refused() -> None:
    q, pages, tables, *where = one_case().operands
    assert split_plan(q, pages, *where, platform="tpu") is None
    plan = jax.eval_shape(functools.partial(split_plan, platform="gpu", interpret=True), q, pages, *where)
    call = functools.partial(paged_attention, scale=0.1, plan=plan)
    with pytest.raises(ValueError, match="only platform='gpu' takes a plan, got one for 'cpu'"):
        call(q, pages, tables, *where, platform="cpu")
    lens, places, positions, window = where
    fewer = q[:2], pages, tables[:2], lens[:2], places[:2], positions[:2], window
    with pytest.raises(ValueError, match="q has 2 requests, but the plan is of 3"):
        call(*fewer, platform="gpu", interpret=True)


@pytest.mark.parametrize("programs", [1, 7])
def test_every_slot_is_in_one_part_and_shares_are_equal(programs: int) -> None:
    B, M, p, block = 5, 8, 24, 64
    page_index = jnp.tile(jnp.arange(M, dtype=jnp.int32), (B, 1))
    program = jax.jit(functools.partial(plan_splits, page_size=p, block=block, programs=programs))

    @settings(max_examples=40)
    @given(
        contexts=st.lists(st.integers(0, M * p), min_size=B, max_size=B),
        window=st.sampled_from([NO_WINDOW, 50]),
    )
    def holds(contexts: list[int], window: int) -> None:
        lengths = jnp.array(contexts, jnp.int32)
        plan = program(lengths, page_index, lengths[:, None], jnp.int32(window))
        _check_plan(jax.tree.map(np.asarray, plan), contexts, window, p, block)

    holds()


def _check_plan(plan: SplitPlan, contexts: list[int], window: int, p: int, block: int) -> None:
    for b, context in enumerate(contexts):
        parts = range(plan.request_parts[b], plan.request_parts[b + 1])
        slots = [slot for i in parts for slot in range(plan.start[i], plan.stop[i])]
        first = max(context - window + 1, 0) // p * p
        assert slots == list(range(first, -(-context // p) * p))
        assert {int(plan.request[i]) for i in parts} <= {b}
    blocks = -(-(plan.stop - plan.start) // block)
    edges = plan.program_parts
    shares = [int(blocks[start:stop].sum()) for start, stop in itertools.pairwise(edges)]
    assert edges[0] == 0
    assert sum(shares) == blocks[: plan.request_parts[-1]].sum()
    assert max(shares) == -(-sum(shares) // len(shares))
    assert np.all(blocks[: edges[-1]] > 0)


def test_merge_of_any_number_of_parts() -> None:
    rng = np.random.default_rng(0)
    counts = [0, 1, PARTS_AT_A_TIME, 2 * PARTS_AT_A_TIME + 3, 2]
    edges = np.cumsum([0, *counts]).astype(np.int32)
    o = rng.standard_normal((edges[-1] + 3, 1, 2, 80)).astype(np.float32)
    lse = (50 * rng.standard_normal(o.shape[:3])).astype(np.float32)
    o[edges[-1] :] = lse[edges[-1] :] = np.nan  # belong to nobody
    o[edges[-2] : edges[-1]], lse[edges[-2] : edges[-1]] = 0, -np.inf
    merged = jax.jit(functools.partial(merge_parts, interpret=True))
    got_o, got_lse = merged(jnp.array(o), jnp.array(lse), jnp.array(edges))
    for b, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts = lse[start:stop].astype(np.float64)
        want = np.logaddexp.reduce(parts, axis=0, initial=-np.inf)
        np.testing.assert_allclose(got_lse[b], want, rtol=1e-6)
        weights = np.exp(parts - np.where(np.isinf(want), 0, want))
        np.testing.assert_allclose(got_o[b], np.sum(weights[..., None] * o[start:stop], axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "changes"),
    [
        *((stored, {}) for stored in (np.float32, jnp.bfloat16, np.float16, *EIGHT_BITS)),
        (jnp.bfloat16, {"Q": 3, "G": 5, "H": 80, "p": 24, "M": 14}),
    ],
)
def test_lowers_for_cuda(stored: type, changes: dict) -> None:
    is_quantized = stored in EIGHT_BITS
    case = one_case(**{"H": 128, "dtype": np.float32 if is_quantized else stored} | changes)
    operands = (quantized(case, stored) if is_quantized else case).operands
    program = jax.jit(functools.partial(paged_attention, scale=0.1, softcap=20.0, platform="gpu"))
    chip = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    # JAX 0.11 asks which GPU it is for.
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        lowered = program.trace(*operands).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 2


def test_one_byte_pages_that_32_bits_do_not_count_are_refused() -> None:
    q, _, *rest = one_case(K=8, H=128).operands

    def call(P: int) -> None:
        values = jax.ShapeDtypeStruct((P, 2, 8, 64, 128), jnp.int8)
        pages = QuantizedPages(values, jax.ShapeDtypeStruct(values.shape[:4], jnp.float32))
        jax.eval_shape(functools.partial(paged_attention, scale=0.1, platform="gpu"), q, pages, *rest)

    call(16_384)
    call(32_769)
    with pytest.raises(ValueError, match=r"20000 pages of int8 come to 2\.44 GiB: .* at most 2 GiB"):
        call(20_000)


@pytest.mark.parametrize("R", [1, 16, 28, 4096])
@pytest.mark.parametrize(("H", "itemsize"), [(8, 1), (64, 1), (80, 2), (128, 2), (256, 4), (512, 4)])
def test_every_tiling_is_of_powers_of_two(R: int, H: int, itemsize: int) -> None:
    tiling = choose_tiling(R, H, itemsize)
    assert all(size >= 16 and size.bit_count() == 1 for size in (tiling.rows, tiling.block))
