"""Pages of 8 bits: what is kept of k and v, and attention over it, against float64 numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from paged_cases import Case, attend, cases, check, dequantized, make_case, quantized

from pallas_kernels import QuantizedPages, append_kv, paged_attention
from pallas_kernels.paged_attention.contract import as_bfloat16

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
STORED = [np.dtype(np.int8), np.dtype(np.uint8), FP8]
# Of the largest value in a vector: half a step of int8, half a step of 3 bits of mantissa.
ROUNDING = {np.dtype(np.int8): 0.5 / 127, FP8: 2.0**-4, np.dtype(np.uint8): 2.0**-4}

STORAGE = pytest.mark.parametrize("stored", STORED, ids=str)
XLA_READINGS = pytest.mark.parametrize("platform", [None, "cpu"])


append = jax.jit(append_kv)


def empty_pages(shape: tuple[int, ...], stored: np.dtype) -> QuantizedPages:
    return QuantizedPages(jnp.zeros(shape, stored), jnp.zeros(shape[:4], jnp.float32))


# Appending -------------------------------------------------------------------------------------------


@STORAGE
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_append_keeps_the_nearest_values(stored: np.dtype, dtype: type) -> None:
    P, K, p, H, T = 4, 3, 8, 16, 12
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((2, T, K, H)) * 10.0 ** rng.integers(-20, 20, (2, T, K, 1))
    k, v = kv.astype(dtype)
    slots = rng.permutation(P * p)[:T].astype(np.int32)
    slots[:3] = [-1, P * p, 2**31 - 1]
    pages = append(empty_pages((P, 2, K, p, H), stored), k, v, slots)
    assert (pages.values.dtype, pages.scales.dtype) == (stored, np.float32)
    kept = dequantized(pages).transpose(0, 3, 1, 2, 4).reshape(P * p, 2, K, H)
    for token in range(3, T):
        for i, x in enumerate((k, v)):
            exact = x[token].astype(np.float64)
            largest = np.abs(exact).max(axis=-1, keepdims=True)
            assert np.all(np.abs(kept[slots[token], i] - exact) <= ROUNDING[stored] * largest * (1 + 1e-5))
    assert np.count_nonzero(pages.scales) == (T - 3) * 2 * K


@pytest.mark.parametrize("stored", [np.dtype(np.int8), np.dtype(np.uint8)], ids=str)
def test_ties_go_to_even_and_large_values_stay_finite(stored: np.dtype) -> None:
    most = 127 if stored == np.int8 else 448
    # The first value makes the scale 1; the steps of e4m3 between 16 and 32 are 2.
    x = np.array([most, 0.5, 1.5, 2.5, -2.5, 17, 19, -most], np.float32).reshape(1, 1, 8)
    pages = append(empty_pages((1, 2, 1, 1, 8), stored), x, -x, np.zeros(1, np.int32))
    kept = dequantized(pages).reshape(2, 8)
    expected = [most, 0, 2, 2, -2, 17, 19, -most]
    if stored == np.uint8:
        expected = [most, 0.5, 1.5, 2.5, -2.5, 16, 20, -most]
    np.testing.assert_array_equal(kept, [expected, np.negative(expected)])


@STORAGE
@example(largest=0.0)
@example(largest=1e-45)  # not a normal number, nor is its scale
@example(largest=1e-37)
@example(largest=float(np.finfo(np.float32).max))
@settings(max_examples=20)
@given(largest=st.floats(0, float(np.finfo(np.float32).max), width=32))
def test_any_magnitude_is_kept(stored: np.dtype, largest: float) -> None:
    x = np.float32(largest) * np.array([1, -1, 0.25, 0], np.float32).reshape(1, 1, 4)
    pages = append(empty_pages((1, 2, 1, 1, 4), stored), x, x, np.zeros(1, np.int32))
    kept = dequantized(pages)[0, 0, 0, 0]
    tiny = 448 * float(np.finfo(np.float32).tiny)  # below, the scale no longer follows
    assert np.all(np.isfinite(kept))
    np.testing.assert_allclose(kept, x[0, 0], rtol=0, atol=ROUNDING[stored] * largest * (1 + 1e-5) + tiny)


@STORAGE
@pytest.mark.parametrize("tokens", [1, 64])
def test_donated_pages_are_written_in_place(stored: np.dtype, tokens: int) -> None:
    pages = empty_pages((32, 2, 2, 16, 64), stored)
    k = jnp.ones((tokens, 2, 64), jnp.bfloat16)
    slots = jnp.arange(tokens, dtype=jnp.int32)
    compiled = jax.jit(append_kv, donate_argnums=0).lower(pages, k, k, slots).compile()
    if stored != FP8:  # those are converted on a CPU, all of them: hence their bits
        assert compiled.memory_analysis().temp_size_in_bytes < pages.values.nbytes
    before = [array.unsafe_buffer_pointer() for array in pages]
    pages = compiled(pages, k, k, slots)
    assert [array.unsafe_buffer_pointer() for array in pages] == before
    assert [np.count_nonzero(array) for array in pages] == [tokens * 2 * 2 * 64, tokens * 2 * 2]


# Attention -------------------------------------------------------------------------------------------


def test_every_fp8_value_is_a_bfloat16() -> None:
    bits = np.arange(256, dtype=np.uint8)
    exact = bits.view(FP8).astype(np.float32)
    for stored in (bits, bits.view(FP8)):
        wide = np.asarray(jax.jit(as_bfloat16)(stored)).astype(np.float32)
        assert np.all(np.isfinite(wide))
        np.testing.assert_array_equal(wide[~np.isnan(exact)], exact[~np.isnan(exact)])


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    shape = {
        "B": draw(st.integers(1, 4)),
        "Q": draw(st.sampled_from([1, 1, 2, 9])),
        "K": draw(st.integers(1, 3)),
        "G": draw(st.sampled_from([1, 2, 4, 5, 7, 8, 16])),
        "H": draw(st.sampled_from([64, 80, 96, 128, 256])),
        "p": draw(st.sampled_from([4, 16, 64])),
        "M": draw(st.integers(1, 5)),
    }
    case = draw(cases(shape))
    # q as it comes from a bfloat16 model: what is left to differ are the products.
    case = dataclasses.replace(case, q=case.q.astype(ml_dtypes.bfloat16))
    return dataclasses.replace(case, softcap=draw(st.sampled_from([None, 3.0])))


@settings(max_examples=4)
@given(case=any_case(), platform=st.sampled_from(["cpu", None]), stored=st.sampled_from(STORED))
def test_any_shape_equals_numpy(case: Case, platform: str | None, stored: np.dtype) -> None:
    check(quantized(case, stored), attend(quantized(case, stored), platform=platform), tolerance=2e-2)


@pytest.mark.slow
@settings(max_examples=200)
@given(case=any_case(), platform=st.sampled_from(["cpu", None]), stored=st.sampled_from(STORED))
def test_many_shapes_equal_numpy(case: Case, platform: str | None, stored: np.dtype) -> None:
    check(quantized(case, stored), attend(quantized(case, stored), platform=platform), tolerance=2e-2)


@XLA_READINGS
@pytest.mark.parametrize("Q", [1, 18])
@pytest.mark.parametrize("stored", STORED[:2], ids=str)
def test_any_context_window_and_worker_equals_numpy(platform: str | None, Q: int, stored: np.dtype) -> None:
    shape = {"B": 3, "Q": Q, "K": 2, "G": 2, "H": 16, "p": 8, "M": 5}
    program = jax.jit(functools.partial(paged_attention, scale=0.25, platform=platform))

    @settings(max_examples=20)
    @given(case=cases(shape))
    def equals_numpy(case: Case) -> None:
        case = quantized(dataclasses.replace(case, q=case.q.astype(ml_dtypes.bfloat16)), stored)
        check(case, program(*case.operands), tolerance=2e-2)

    equals_numpy()


def test_scales_count_per_token_and_head() -> None:
    """In float32 throughout, k and v of all magnitudes: a scale taken of another place shows."""
    case = make_case(0, B=2, Q=1, K=2, G=2, H=16, p=8, M=3, contexts=[21, 9])
    sizes = 10.0 ** np.random.default_rng(0).integers(-2, 3, case.pages.shape[:4])
    case = dataclasses.replace(case, pages=case.pages * sizes[..., None].astype(np.float32), scale=0.1)
    case = quantized(case, np.int8)
    check(case, attend(case, platform=None))


@pytest.mark.parametrize("platform", [None, "cpu"])
def test_heads_on_several_devices(platform: str | None) -> None:
    case = quantized(make_case(1, B=2, Q=1, K=4, G=3, H=32, p=8, M=3, contexts=[13, 24]), np.int8)
    heads, everywhere = PartitionSpec(None, None, "kv"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(paged_attention, **case.options, platform=platform),
        mesh=Mesh(np.array(jax.devices()[:2]), ("kv",)),
        in_specs=(heads, heads, *(everywhere,) * 5),
        out_specs=(heads, heads),
    )
    check(case, jax.jit(sharded)(*case.operands), tolerance=2e-2)


@pytest.mark.parametrize(
    ("values", "scales", "dtype", "message"),
    [
        (np.int16, (4, 2, 2, 8), None, r"int8, float8_e4m3fn or its bits as uint8, .* got int16"),
        (np.int8, (4, 2, 2), None, r"scales .* must be \[P, 2, K, p\], got \(4, 2, 2\)"),
        (np.int8, (4, 2, 2, 8), "float8_e4m3fn", r"pages are int8, but dtype says float8_e4m3fn"),
        (np.uint8, (4, 2, 2, 8), "int8", r"pages are float8_e4m3fn, but dtype says int8"),
    ],
)
def test_refusals_name_the_value(
    values: type, scales: tuple[int, ...], dtype: str | None, message: str
) -> None:
    case = make_case(0, B=1, Q=1, K=2, G=2, H=16, p=8, M=2, contexts=[5])
    pages = QuantizedPages(np.zeros((4, 2, 2, 8, 16), values), np.zeros(scales, np.float32))
    case = dataclasses.replace(case, pages=pages)
    with pytest.raises(ValueError, match=message):
        paged_attention(*case.operands, **case.options, dtype=dtype)
