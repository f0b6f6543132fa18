"""The C++ kernels against float64 numpy and XLA; skipped where no compiler is found."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import attend as attend_on
from paged_cases import cases, check, expected, make_case, quantized, shapes

from lamina_jax.native_products import with_native_products
from pallas_kernels import QuantizedPages, native


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        native.load()
    except native.BuildError as error:
        pytest.skip(str(error))


attend = functools.partial(attend_on, platform="native")


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_equals_numpy(data: st.DataObject) -> None:
    shape = data.draw(shapes()) | {"H": data.draw(st.sampled_from([16, 48, 64, 80, 96, 128, 256]))}
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16]))
    case = data.draw(cases(shape, dtype))
    case = dataclasses.replace(case, softcap=data.draw(st.sampled_from([None, 3.0])))
    if dtype == jnp.bfloat16 and data.draw(st.booleans()):
        case = quantized(case, data.draw(st.sampled_from([np.int8, np.uint8])))
    check(case, attend(case), tolerance=1e-5 if dtype == np.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("B", "Q", "G"), [(1, 1, 2), (1, 1, 7), (1, 40, 2), (9, 1, 4)])
def test_long_contexts_shared_by_threads(dtype: type, B: int, Q: int, G: int) -> None:
    """Enough pages that several threads take part, and few enough requests that each is split."""
    contexts = [2048 - 61 * b for b in range(B)]
    case = make_case(3, B=B, Q=Q, K=2, G=G, H=64, p=16, M=128, contexts=contexts, dtype=dtype)
    check(case, attend(case), tolerance=1e-5 if dtype == np.float32 else 2e-2)
    windowed = make_case(3, B=B, Q=Q, K=2, G=G, H=64, p=16, M=128, contexts=contexts, dtype=dtype, window=700)
    check(windowed, attend(windowed), tolerance=1e-5 if dtype == np.float32 else 2e-2)


def test_whole_numbers_for_int8_pages_lose_little() -> None:
    """Queries and weights become whole numbers of 16 bits: far closer than pages are to what was stored."""
    case = make_case(1, B=3, Q=2, K=2, G=5, H=128, p=64, M=9, contexts=[0, 65, 573])
    check(quantized(case, np.int8), attend(quantized(case, np.int8)), tolerance=2e-4)


def test_long_pages_of_int8_do_not_overflow() -> None:
    case = make_case(1, B=1, Q=1, K=1, G=1, H=16, p=2048, M=1, contexts=[2048])
    values = np.full_like(case.pages, -128, np.int8)
    extreme = dataclasses.replace(case, pages=QuantizedPages(values, np.ones(values.shape[:-1], np.float32)))
    check(extreme, attend(extreme), tolerance=2e-3)


def test_every_float8_is_read_exactly() -> None:
    """256 tokens, each alone with its query, hold one of all magnitudes and signs; NaN are none."""
    magnitudes = np.arange(256, dtype=np.uint8)
    magnitudes[[127, 255]] = 0
    case = make_case(0, B=256, Q=1, K=1, G=1, H=16, p=8, M=1, contexts=[1] * 256, dtype=jnp.bfloat16)
    values = np.zeros(case.pages.shape, np.uint8)
    values[case.block_tables[:, 0], :, :, 0] = magnitudes[:, None, None, None]
    pages = QuantizedPages(values, np.ones(values.shape[:-1], np.float32))
    o, _ = attend(dataclasses.replace(case, pages=pages))
    want = np.broadcast_to(
        magnitudes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None, None, None], o.shape
    )
    np.testing.assert_array_equal(o, want)


def test_bits_are_those_of_a_bfloat16() -> None:
    bfloat16, float16 = (
        make_case(0, B=2, Q=1, K=2, G=2, H=16, p=8, M=5, contexts=[21, 40], dtype=dtype)
        for dtype in (jnp.bfloat16, np.float16)
    )
    stored = dataclasses.replace(bfloat16, pages=bfloat16.pages.view(np.uint16))
    check(bfloat16, attend(stored, dtype=jnp.bfloat16), tolerance=2e-2)
    for pages in (float16.pages, float16.pages.view(np.uint16)):
        with pytest.raises(ValueError, match="no float16 pages"):
            attend(dataclasses.replace(float16, pages=pages), dtype=jnp.float16)


def test_large_scores() -> None:
    case = make_case(0, B=3, Q=2, K=2, G=2, H=16, p=8, M=5, contexts=[5, 21, 40])
    case = dataclasses.replace(case, q=np.round(case.q * 200), pages=np.round(case.pages * 200), scale=1.0)
    assert np.nanmax(np.abs(expected(case)[1])) > 1e5
    check(case, attend(case))


@pytest.mark.parametrize("T", [1, 4, 7, 32])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 4), (48, 12), (256, 1024), (1040, 260)])
def test_products_equal_xla(T: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((T, inputs), (outputs, inputs))
    )
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(jax.jit(native.matmul)(x, w), want, rtol=1e-5, atol=1e-4)


def test_products_are_found_in_a_program() -> None:
    """Those that fit, wherever they stand, and no others."""

    def model(x: jax.Array, w: jax.Array, many: jax.Array) -> dict[str, jax.Array]:
        def product(x: jax.Array) -> jax.Array:
            dims = (((1,), (1,)), ((), ()))
            return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

        return {
            "few": jnp.tanh(product(x)),
            "many": product(many),
            "float32": x.astype(jnp.float32) @ w.T.astype(jnp.float32),
        }

    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((8, 64), (32, 64), (33, 64))
    ]
    rewritten = jax.jit(with_native_products(model))
    assert rewritten.lower(*arrays).as_text().count("lamina_matmul") == 1
    for name, value in model(*arrays).items():
        np.testing.assert_allclose(rewritten(*arrays)[name], value, rtol=1e-5, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([np.float32, np.int8]))
def test_tables_of_an_enemy_lead_nowhere(seed: int, dtype: type) -> None:
    """A worker is told its tables by others: any numbers are read within the pool, or not at all."""
    rng = np.random.default_rng(seed)
    case = make_case(0, B=3, Q=2, K=2, G=2, H=16, p=8, M=5, contexts=[5, 21, 40])
    if dtype == np.int8:
        case = quantized(case, dtype)

    def anything(shape: tuple[int, ...]) -> np.ndarray:
        bounds = rng.choice([4, 50, 2**31 - 1])
        return rng.integers(-bounds - 1, bounds, shape, endpoint=True).astype(np.int32)

    hostile = dataclasses.replace(
        case,
        block_tables=anything(case.block_tables.shape),
        page_index=anything(case.page_index.shape),
        context_lens=anything(case.context_lens.shape),
        q_positions=anything(case.q_positions.shape),
    )
    jax.block_until_ready(attend(hostile))


@pytest.mark.parametrize("stored", [np.float32, np.int8, np.uint8])
@pytest.mark.parametrize("context", [1, 21])
def test_not_a_number_is_not_hidden(stored: type, context: int) -> None:
    case = make_case(0, B=2, Q=1, K=2, G=2, H=16, p=8, M=5, contexts=[context, 40])
    case = case if stored == np.float32 else quantized(case, stored)
    q = case.q.copy()
    q[0, 0, 1] = np.nan
    o, _ = attend(dataclasses.replace(case, q=q))
    assert np.isnan(o[0, 0, 1]).all()
    assert not np.isnan(np.delete(np.asarray(o), 1, axis=2)).any()


@pytest.mark.parametrize("stored", [np.int8, np.uint8])
def test_a_scale_that_is_not_a_number_is_not_hidden(stored: type) -> None:
    case = quantized(make_case(0, B=1, Q=1, K=2, G=2, H=16, p=8, M=5, contexts=[21]), stored)
    values, scales = case.pages
    scales = scales.copy()
    scales[case.block_tables[0, 1], 1, 0, 3] = np.nan  # of a value
    o, lse = attend(dataclasses.replace(case, pages=QuantizedPages(values, scales)))
    assert np.isnan(o[0, 0, :2]).all()
    assert not np.isnan(o[0, 0, 2:]).any()
    assert not np.isnan(lse).any()


def test_products_of_nothing_are_zero() -> None:
    x, w = (jnp.zeros((rows, 0), jnp.bfloat16) for rows in (2, 4))
    np.testing.assert_array_equal(jax.jit(native.matmul)(x, w), np.zeros((2, 4), np.float32))
