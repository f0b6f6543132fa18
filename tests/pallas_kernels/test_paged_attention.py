"""The XLA readings of paged attention against float64 numpy, and the contract that all readings share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from paged_cases import Case, attend, cases, check, expected, make_case, shapes

from pallas_kernels import NO_PAGE, paged_attention
from pallas_kernels.paged_attention.contract import check_shapes

XLA_READINGS = pytest.mark.parametrize("platform", [None, "cpu"])


SHAPE = {"B": 3, "Q": 1, "K": 2, "G": 2, "H": 16, "p": 8, "M": 5}


def small_case(**changes: object) -> Case:
    return make_case(0, **(SHAPE | {"contexts": [0, 21, 32]} | changes))


@settings(max_examples=10)
@given(data=st.data())
def test_any_shape_equals_numpy(data: st.DataObject) -> None:
    platform = data.draw(st.sampled_from(["cpu", None]))
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16]))
    case = data.draw(cases(data.draw(shapes()), dtype))
    case = dataclasses.replace(case, softcap=data.draw(st.sampled_from([None, 3.0])))
    check(case, attend(case, platform=platform), tolerance=1e-5 if dtype == np.float32 else 2e-2)


@XLA_READINGS
@pytest.mark.parametrize("Q", [1, 18])
def test_any_context_window_and_worker_equals_numpy(platform: str | None, Q: int) -> None:
    program = jax.jit(functools.partial(paged_attention, scale=0.25, platform=platform))

    @settings(max_examples=30)
    @given(case=cases(SHAPE | {"Q": Q}))
    def equals_numpy(case: Case) -> None:
        check(case, program(*case.operands))

    equals_numpy()
    assert program._cache_size() == 1  # the window, too, is an operand


@XLA_READINGS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_uint16_pages_are_bit_patterns(platform: str | None, dtype: type) -> None:
    case = small_case(dtype=dtype)
    stored = dataclasses.replace(case, pages=case.pages.view(np.uint16))
    check(case, attend(stored, platform=platform, dtype=dtype), tolerance=2e-2)


@XLA_READINGS
@pytest.mark.parametrize("Q", [1, 18])
def test_rows_without_visible_tokens(platform: str | None, Q: int) -> None:
    o, lse = attend(small_case(Q=Q, contexts=[0, 0, 0]), platform=platform)
    assert np.all(np.asarray(o) == 0)
    assert np.all(np.asarray(lse) == -np.inf)


@XLA_READINGS
def test_large_scores(platform: str | None) -> None:
    """Integers, so that float32 scores up to 10^6 are exact: only a lost maximum can go wrong."""
    case = small_case(contexts=[5, 21, 40], Q=2)
    case = dataclasses.replace(
        case, q=np.round(case.q * 200), pages=np.round(case.pages * 200) * np.float32(1), scale=1.0
    )
    assert np.nanmax(np.abs(expected(case)[1])) > 1e5
    check(case, attend(case, platform=platform))


def test_parts_of_a_context_merge_to_the_whole() -> None:
    whole = small_case(Q=2, contexts=[1, 9, 40])
    parts = []
    for worker in range(3):  # the worker's share of the same pages
        mine = whole.page_index % 3 == worker
        order = np.argsort(~mine, axis=1, kind="stable")
        page_index = np.where(mine, whole.page_index, NO_PAGE)
        parts.append(
            dataclasses.replace(
                whole,
                block_tables=np.take_along_axis(whole.block_tables, order, axis=1),
                page_index=np.take_along_axis(page_index, order, axis=1),
            )
        )
    program = jax.jit(functools.partial(paged_attention, **whole.options, platform="cpu"))
    outputs = [program(*part.operands) for part in parts]
    o, lse = (np.stack(arrays) for arrays in zip(*outputs, strict=True))
    weights = np.exp(lse - np.logaddexp.reduce(lse, axis=0))
    want_o, want_lse = expected(whole)
    np.testing.assert_allclose(np.sum(weights[..., None] * o, axis=0), want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.logaddexp.reduce(lse, axis=0), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("devices", "Q"), [(2, 1), (4, 12)])
@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
def test_heads_on_several_devices(devices: int, platform: str | None, Q: int) -> None:
    case = make_case(1, B=2, Q=Q, K=4, G=3, H=128, p=8, M=3, contexts=[13, 24])
    interpret = platform == "tpu"
    cached_part = functools.partial(paged_attention, **case.options, platform=platform, interpret=interpret)
    heads, everywhere = PartitionSpec(None, None, "kv"), PartitionSpec()
    sharded = jax.shard_map(
        cached_part,
        mesh=Mesh(np.array(jax.devices()[:devices]), ("kv",)),
        in_specs=(heads, heads, *(everywhere,) * 5),
        out_specs=(heads, heads),
    )
    outputs = jax.jit(sharded)(*case.operands)
    assert {len(output.sharding.device_set) for output in outputs} == {devices}
    check(case, outputs)


def test_request_split_over_devices() -> None:
    """Pages and rows on different devices: the loop's carry varies over the mesh with its operands."""
    case = small_case(B=2, contexts=[21, 32])
    cached_part = functools.partial(paged_attention, **case.options, platform="cpu")
    everywhere, rows = PartitionSpec(), PartitionSpec("w")
    sharded = jax.shard_map(
        cached_part,
        mesh=Mesh(np.array(jax.devices()[:2]), ("w",)),
        in_specs=(rows, everywhere, rows, rows, rows, rows, everywhere),
        out_specs=rows,
    )
    check(case, jax.jit(sharded)(*case.operands))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"platform": "cuda"}, r"one of cpu, native, gpu, tpu or None, got 'cuda'"),
        ({}, {"platform": "cpu", "interpret": True}, r"interpret=True .* got 'cpu'"),
        ({}, {"dtype": jnp.bfloat16}, r"pages are float32, but dtype says bfloat16"),
        (
            {"pages": np.zeros((4, 2, 2, 8, 16), np.uint16)},
            {},
            r"must be bfloat16 or float16, got None",
        ),
        ({"pages": np.zeros((4, 2, 2, 8, 16), np.int8)}, {}, r"or QuantizedPages of 8 bits, got int8"),
        ({"pages": np.zeros((4, 2, 3, 8, 16), np.float32)}, {}, r"4 query heads cannot share 3 KV heads"),
    ],
)
def test_refusals_name_the_value(changes: dict, options: dict, message: str) -> None:
    case = dataclasses.replace(small_case(), **changes)
    with pytest.raises(ValueError, match=message):
        paged_attention(*case.operands, **case.options, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_index": (3, 4)}, r"page_index is \(3, 4\)"),
        ({"context_lens": (2,)}, r"context_lens must be \(3,\), got \(2,\)"),
        ({"q_positions": (3, 2)}, r"q_positions must be \(3, 1\), got \(3, 2\)"),
    ],
    ids=str,
)
def test_tables_of_other_requests_are_refused(changes: dict, message: str) -> None:
    """Asked here of the check itself: in tests the annotations of `paged_attention` refuse them first."""
    names = ("q", "pages", "block_tables", "context_lens", "page_index", "q_positions")
    shapes = {name: getattr(small_case(), name).shape for name in names} | changes
    with pytest.raises(ValueError, match=message):
        check_shapes(*(jnp.zeros(shapes[name], jnp.int32) for name in names))
