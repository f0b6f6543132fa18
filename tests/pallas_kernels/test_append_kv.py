"""append_kv against a loop over tokens, and what donation must save: no copy of the pool, ever."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import QuantizedPages, append_kv, paged_attention
from pallas_kernels.append_kv.tpu import must_put_rows, put_rows
from pallas_kernels.paged_attention.tpu_plan import Chip


def bits(array: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@st.composite
def slot_lists(draw: st.DrawFn, slots: int, T: int) -> list[int]:
    """T slots, each at most once, except what is out of range: padding repeats it. Some are neighbours."""
    first = draw(st.integers(0, slots - 1))
    run = range(first, min(first + draw(st.integers(0, T)), slots))
    others = draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=T))
    inside = list(dict.fromkeys([*run, *others]))[:T]
    outside = st.sampled_from([slots, slots + 5, 2**31 - 1, -1, -slots])
    every = inside + [draw(outside) for _ in range(T - len(inside))]
    return draw(st.one_of(st.just(every), st.permutations(every)))


def append_in_a_loop(pages: np.ndarray, k: np.ndarray, v: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    pages = pages.copy()
    P, _, _, page_size, _ = pages.shape
    for token, slot in enumerate(slots):
        if 0 <= slot < P * page_size:
            pages[slot // page_size, 0, :, slot % page_size] = k[token]
            pages[slot // page_size, 1, :, slot % page_size] = v[token]
    return pages


@pytest.mark.parametrize(
    ("dtype", "as_bits"),
    [(jnp.float32, False), (jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float16, True)],
)
def test_equals_a_loop_over_tokens(dtype: type, as_bits: bool) -> None:
    P, K, p, H, T = 5, 3, 4, 8, 10
    program = jax.jit(append_kv)

    @settings(max_examples=20)
    @given(slots=slot_lists(P * p, T), seed=st.integers(0, 2**32 - 1))
    def equals_a_loop(slots: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        pages = rng.standard_normal((P, 2, K, p, H)).astype(dtype)
        k, v = rng.standard_normal((2, T, K, H)).astype(dtype)
        stored = pages.view(np.uint16) if as_bits else pages
        got = program(stored, k, v, np.array(slots, np.int32))
        assert got.dtype == stored.dtype
        np.testing.assert_array_equal(bits(got), bits(append_in_a_loop(pages, k, v, slots)))

    equals_a_loop()


def test_refuses_to_convert() -> None:
    k = jnp.zeros((1, 2, 8))
    with pytest.raises(ValueError, match="k and v are float32, but pages hold uint16"):
        append_kv(jnp.zeros((4, 2, 2, 4, 8), jnp.uint16), k, k, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="k is float32, but v is bfloat16"):
        append_kv(jnp.zeros((4, 2, 2, 4, 8)), k, k.astype(jnp.bfloat16), jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_donated_pages_are_written_in_place(tokens: int) -> None:
    pages = jnp.zeros((32, 2, 2, 16, 64), jnp.uint16)
    before = pages.unsafe_buffer_pointer()
    k = jnp.ones((tokens, 2, 64), jnp.bfloat16)
    pages = jax.jit(append_kv, donate_argnums=0)(pages, k, k, jnp.arange(tokens, dtype=jnp.int32))
    assert pages.unsafe_buffer_pointer() == before
    assert np.count_nonzero(pages) == tokens * 2 * 2 * 64


@pytest.mark.parametrize("devices", [2, 4])
def test_heads_on_several_devices(devices: int) -> None:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("kv",))
    page_heads, token_heads = PartitionSpec(None, None, "kv"), PartitionSpec(None, "kv")
    k, v = np.random.default_rng(0).standard_normal((2, 5, 4, 8)).astype(jnp.bfloat16)
    slots = np.array([3, 17, 32, 0, 31], np.int32)
    pages = np.zeros((8, 2, 4, 4, 8), jnp.bfloat16)
    sharded = jax.shard_map(
        append_kv,
        mesh=mesh,
        in_specs=(page_heads, token_heads, token_heads, PartitionSpec()),
        out_specs=page_heads,
    )
    pool = jax.device_put(pages.view(np.uint16), NamedSharding(mesh, page_heads))
    got = jax.jit(sharded, donate_argnums=0)(pool, k, v, slots)
    assert len(got.sharding.device_set) == devices
    np.testing.assert_array_equal(got, bits(append_in_a_loop(pages, k, v, slots)))


def step(pages: jax.Array, k: jax.Array, *, append_first: bool) -> tuple[jax.Array, jax.Array]:
    """A decode step of two requests in one program: append their tokens, attend to what was there before."""
    context_lens = jnp.array([9, 30], jnp.int32)
    block_tables = jnp.array([[5, 2, 0, 0], [7, 1, 4, 6]], jnp.int32)
    page_index = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], (2, 4))
    slots = jnp.array([2 * 8 + 1, 6 * 8 + 6], jnp.int32)
    attend = functools.partial(
        paged_attention,
        k[:, None],
        block_tables=block_tables,
        context_lens=context_lens,
        page_index=page_index,
        q_positions=context_lens[:, None],
        window=2**30,
        scale=0.1,
        dtype=jnp.bfloat16,
        platform="cpu",
    )
    if append_first:
        pages = append_kv(pages, k, k, slots)
        return pages, attend(pages=pages)[0]
    o = attend(pages=pages)[0]
    return append_kv(pages, k, k, slots), o


def test_append_then_attend_copies_no_pool() -> None:
    pages = jnp.asarray(np.random.default_rng(0).standard_normal((256, 2, 2, 8, 128)), jnp.bfloat16)
    pages = jax.lax.bitcast_convert_type(pages, jnp.uint16)
    k = jnp.full((2, 2, 128), 3.0, jnp.bfloat16)
    outputs = {}
    for append_first in (True, False):
        program = jax.jit(functools.partial(step, append_first=append_first), donate_argnums=0)
        compiled = program.lower(pages, k).compile()
        outputs[append_first] = compiled(jnp.copy(pages), k)
        copies_pool = compiled.memory_analysis().temp_size_in_bytes >= pages.nbytes
        # Reading first is what this test must be able to notice.
        assert copies_pool != append_first
    jax.tree.map(np.testing.assert_array_equal, outputs[True], outputs[False])


# The kernel of a TPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "p", "H", "chip"),
    [
        (np.float32, 16, 128, Chip()),
        (jnp.bfloat16, 32, 128, Chip()),
        # The ring holds two tiles, and the tokens are put 32 at a time.
        (np.int8, 64, 128, Chip(vmem_bytes=1 << 14)),
        (np.uint8, 128, 64, Chip()),
        # Scales.
        (np.float32, 256, None, Chip(vmem_bytes=1 << 14)),
        (np.float32, 64, None, Chip()),
        (np.float32, 192, None, Chip()),
    ],
)
def test_put_rows_equals_a_loop(dtype: type, p: int, H: int | None, chip: Chip) -> None:
    P, K, T = 3, 2, 40
    program = jax.jit(functools.partial(put_rows, chip=chip, interpret=True))

    @settings(max_examples=20)
    @given(slots=slot_lists(P * p, T), seed=st.integers(0, 2**32 - 1))
    def equals_a_loop(slots: list[int], seed: int) -> None:
        pages, rows = made_rows(seed, dtype, P, K, p, H, T)
        got = program(pages, rows, np.array(slots, np.int32))
        np.testing.assert_array_equal(bits(got), bits(put_in_a_loop(pages, rows, slots)))

    equals_a_loop()


@pytest.mark.slow
@pytest.mark.timeout(300)  # a semaphore that is never signalled waits for ever
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_no_copy_meets_another(tokens: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Copies run beside the kernel; a race is printed by JAX, not raised."""
    pages, rows = made_rows(0, np.float32, 10, 1, 8, 128, 10)
    slots = [*(8 * i + i % 3 for i in range(tokens)), *(-1,) * (10 - tokens)]
    interpret = pltpu.InterpretParams(detect_races=True)
    got = put_rows(jnp.array(pages), jnp.array(rows), jnp.array(slots, jnp.int32), interpret=interpret)
    np.testing.assert_array_equal(got, put_in_a_loop(pages, rows, slots))
    assert "RACE" not in capfd.readouterr().out


def made_rows(
    seed: int, dtype: type, P: int, K: int, p: int, H: int | None, T: int
) -> tuple[np.ndarray, np.ndarray]:
    rng, end = np.random.default_rng(seed), () if H is None else (H,)
    pages = 50 * rng.standard_normal((P, 2, K, p, *end))
    return pages.astype(dtype), (50 * rng.standard_normal((T, 2, K, *end))).astype(dtype)


def put_in_a_loop(pages: np.ndarray, rows: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    with_end = (pages, rows) if pages.ndim == 5 else (pages[..., None], rows[..., None])
    k, v = with_end[1][:, 0], with_end[1][:, 1]
    return append_in_a_loop(with_end[0], k, v, slots).reshape(pages.shape)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("p", [64, 128])
def test_quantised_pages_are_those_of_xla(dtype: type, p: int) -> None:
    P, K, H, T = 2, 2, 128, 5
    pages = QuantizedPages(jnp.zeros((P, 2, K, p, H), dtype), jnp.zeros((P, 2, K, p)))
    k, v = np.random.default_rng(0).standard_normal((2, T, K, H)).astype(jnp.bfloat16)
    slots = np.array([p - 1, p, -1, 2 * p - 1, 0], np.int32)
    programs = jax.jit(append_kv), jax.jit(functools.partial(append_kv, platform="tpu", interpret=True))
    kept, got = (program(pages, k, v, slots) for program in programs)
    jax.tree.map(np.testing.assert_array_equal, got, kept)


def test_heads_on_several_devices_of_a_tpu() -> None:
    mesh, p = Mesh(np.array(jax.devices()[:2]), ("kv",)), 128
    page_heads, token_heads = PartitionSpec(None, None, "kv"), PartitionSpec(None, "kv")
    pages, rows = made_rows(0, np.float32, 2, 2, p, 64, 4)
    slots = np.array([3, 2 * p - 1, 2 * p, 4], np.int32)
    sharded = jax.shard_map(
        functools.partial(append_kv, platform="tpu", interpret=True),
        mesh=mesh,
        in_specs=(page_heads, token_heads, token_heads, PartitionSpec()),
        out_specs=page_heads,
        check_vma=False,  # the interpreter's own loops do not keep to it
    )
    got = jax.jit(sharded)(pages, rows[:, 0], rows[:, 1], slots)
    np.testing.assert_array_equal(got, put_in_a_loop(pages, rows, slots))


def test_xla_puts_what_it_puts_in_place() -> None:
    wide, narrow = jnp.zeros((1, 2, 2, 128, 128), jnp.bfloat16), jnp.zeros((1, 2, 2, 128, 64), jnp.bfloat16)
    assert [must_put_rows(wide, tokens) for tokens in (1, 512, 1024)] == [False, False, True]
    assert must_put_rows(narrow, 1)
    assert must_put_rows(wide[:, :, :1], 1)
    assert must_put_rows(wide.astype(jnp.int8), 1)
    assert must_put_rows(jnp.zeros((1, 2, 1, 64)), 1)
