"""Sampling on the device, against references in numpy that sort the vocabulary."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.core import MAX_LOGPROBS
from lamina_jax.engine import truncation
from lamina_jax.engine.sampling import edit_logits, greedy, logprobs, sample
from lamina_jax.engine.truncation import in_blocks, thresholds

ROWS = 4
SIZES = (7, 130, 1500)
"""Vocabularies smaller than a block, of odd blocks, and of more tokens than are ever sorted."""

jit_greedy = jax.jit(partial(greedy, size=ROWS))
jit_sample = jax.jit(partial(sample, size=ROWS))
jit_thresholds = jax.jit(thresholds)
jit_edit = jax.jit(edit_logits)


def kept(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, probabilities) that are left of one row: sort, cut, keep what ties with the last one."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    best = p.max()
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[::-1][top_k - 1], p, 0)
    if top_p < 1:
        falling = np.sort(p)[::-1]
        last = np.searchsorted(np.cumsum(falling), top_p * p.sum() * (1 - 1e-12))
        p = np.where(p >= falling[last], p, 0)
    p = np.where(p >= min_p * best, p, 0)
    return np.flatnonzero(p), p[p > 0] / p.sum()


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> set:
    """The reference's token, and all of uniforms and edges that are too near to tell apart.

    Among those are tokens whose probability is nothing in float32 and just something in float64.
    """
    if temperature == 0:
        return {int(np.argmax(logits))}
    tokens = set()
    for edge in (1 - 2e-6, 1, 1 + 2e-6):
        ids, p = kept(
            logits, temperature, top_k, min(top_p * edge, 1) if top_p < 1 else 1, min(min_p * edge, 1)
        )
        first, last = np.searchsorted(np.cumsum(p), (u - 1e-4, u + 1e-4), side="right")
        tokens.update(ids[min(first, len(ids) - 1) : last + 1].tolist())
    return tokens


def column(values: list[Any], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.array(values), dtype)


row = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.02, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 63, 64, 65, 129, 700, 5000]),
        "top_p": st.one_of(st.just(1.0), st.floats(0.0009765625, 1, width=32)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
        "u": st.integers(0, 2**24 - 1).map(lambda bits: bits * 2.0**-24),
        "spread": st.sampled_from([0.0, 0.1, 1.0, 8.0]),
        "grid": st.booleans(),
        "banned": st.booleans(),
    }
)


@given(st.sampled_from(SIZES), st.lists(row, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32))
@settings(max_examples=100)
def test_a_token_is_the_sorting_reference_s(vocab: int, rows: list[dict[str, Any]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.empty((ROWS, vocab), np.float32)
    for place, r in enumerate(rows):
        values = rng.normal(size=vocab) * r["spread"]
        logits[place] = np.round(values * 2) / 2 if r["grid"] else values  # a grid has ties
        if r["banned"]:
            logits[place, rng.random(vocab) < 0.5] = -np.inf
            logits[place, rng.integers(vocab)] = 1.0
    tokens = jit_sample(
        jnp.asarray(logits),
        column([r["temperature"] for r in rows]),
        column([r["top_k"] for r in rows], jnp.int32),
        column([r["top_p"] for r in rows]),
        column([r["min_p"] for r in rows]),
        column([r["u"] for r in rows]),
    )
    for place, (r, token) in enumerate(zip(rows, np.asarray(tokens), strict=True)):
        names = ("temperature", "top_k", "top_p", "min_p", "u")
        assert int(token) in allowed(logits[place], *(r[name] for name in names)), (place, r)
        assert np.isfinite(logits[place, token])


@pytest.mark.parametrize("group", [None, 2])
def test_groups_and_places_of_rows_change_nothing(group: int | None) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(ROWS, 300)).astype(np.float32)
    settings = [
        column([1.0, 0.7, 0.0, 1.3]),
        column([0, 5, 0, 100], jnp.int32),
        column([0.9, 1.0, 1.0, 0.8]),
        column([0.0, 0.0, 0.0, 0.01]),
        column([0.2, 0.9, 0.5, 0.6]),
    ]
    tokens = jit_sample(jnp.asarray(logits), *settings)
    order = np.array([2, 0, 3, 1])
    moved = jax.jit(partial(sample, size=6, group=group))(
        jnp.asarray(logits[order]), *(s[order] for s in settings)
    )
    assert moved.tolist() == [*np.asarray(tokens)[order], 0, 0]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.2])
def test_thresholds_are_exact_for_any_k(exponent: float) -> None:
    """Flat, smooth and peaked weights; the search must stop at the k-th weight to the last bit."""
    rng = np.random.default_rng(1)
    weights = np.sort(rng.random(3000).astype(np.float32) ** np.float32(8 * exponent))[::-1]
    weights /= weights[0]
    shuffled = jnp.asarray(np.broadcast_to(rng.permutation(weights), (ROWS, 3000)))
    blocks = in_blocks(shuffled, 0.0)
    for ks in ([1, 64, 65, 66], [100, 700, 2998, 2999]):
        found = jit_thresholds(blocks, column(ks, jnp.int32), column([1.0] * ROWS))
        assert found.tolist() == [float(weights[k - 1]) for k in ks]


def test_frequencies_are_the_probabilities() -> None:
    """Pearson's chi-square over 20,000 draws stays below its 0.1 % quantile."""
    rng = np.random.default_rng(2)
    logits, draws = rng.normal(size=12).astype(np.float32), 20_000
    cut = (0.8, 9, 0.95, 0.02)
    ids, p = kept(logits, *cut)
    temperature, top_k, top_p, min_p = cut
    tokens = jax.jit(partial(sample, size=draws))(
        jnp.asarray(np.broadcast_to(logits, (draws, 12))),
        jnp.full(draws, temperature),
        jnp.full(draws, top_k),
        jnp.full(draws, top_p),
        jnp.full(draws, min_p),
        jnp.asarray(rng.random(draws, np.float32)),
    )
    seen = np.bincount(np.asarray(tokens), minlength=12)
    assert seen.sum() == seen[ids].sum() == draws
    chi_square = ((seen[ids] - draws * p) ** 2 / (draws * p)).sum()
    assert len(ids) == 8
    assert chi_square < 24.3  # seven degrees of freedom


@pytest.mark.parametrize("vocab", SIZES)
def test_greedy_takes_the_lowest_of_the_best(vocab: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.integers(0, 3, size=(ROWS, vocab)).astype(np.float32)
    logits[2] = -np.inf
    logits[3] = logits[3, ::-1].cumsum()[::-1]
    expected = np.argmax(logits, axis=1).tolist()
    assert jit_greedy(jnp.asarray(logits)).tolist() == expected
    zero, one = column([0.0] * ROWS), column([1.0] * ROWS)
    none = column([0] * ROWS, jnp.int32)
    assert jit_sample(jnp.asarray(logits), zero, none, one, zero, column([0.999] * ROWS)).tolist() == expected


@given(st.sampled_from(SIZES), st.integers(0, 2**32), st.floats(0, 2), st.floats(0.01, 1))
@settings(max_examples=40)
def test_no_logits_give_an_id_outside_the_vocabulary(
    vocab: int, seed: int, temperature: float, p: float
) -> None:
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0], np.float32)
    logits = odd[rng.integers(rng.integers(1, len(odd) + 1), size=(ROWS, vocab))]
    k = column(rng.integers(0, vocab, size=ROWS), jnp.int32)
    u = column([0.0, 0.5, 1 - 2.0**-24, 1 - 2.0**-24])
    same = [column([value] * ROWS) for value in (temperature, p, 0.0)]
    tokens = np.asarray(jit_sample(jnp.asarray(logits), same[0], k, same[1], same[2], u))
    assert ((tokens >= 0) & (tokens < vocab)).all()
    tokens = np.asarray(jit_greedy(jnp.asarray(logits)))
    assert ((tokens >= 0) & (tokens < vocab)).all()


def edited(logits: np.ndarray, prompt: list[int], out: list[int], edits: dict[str, Any]) -> np.ndarray:
    """The penalties and the bias as their definitions say."""
    logits = logits.astype(np.float64).copy()
    for token in {*prompt, *out}:
        by = edits["repetition"]
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token in set(out):
        logits[token] -= edits["frequency"] * out.count(token) + edits["presence"]
    for token, bias in edits["bias"].items():
        logits[token] += bias
    return logits


ids = st.integers(0, 29)
edits = st.fixed_dictionaries(
    {
        "presence": st.floats(-2, 2),
        "frequency": st.floats(-2, 2),
        "repetition": st.floats(0.5, 2),
        "bias": st.dictionaries(ids, st.sampled_from([-100.0, 3.5, -np.inf]), max_size=4),
    }
)


@given(
    st.lists(st.tuples(st.lists(ids, max_size=6), st.lists(ids, max_size=6), edits), min_size=4, max_size=4)
)
@settings(max_examples=50)
def test_edits_are_their_definition(rows: list[tuple[list[int], list[int], dict[str, Any]]]) -> None:
    vocab = 30
    logits = np.random.default_rng(4).normal(size=(ROWS, vocab)).astype(np.float32) * 3
    history = np.full((ROWS, 12), -1, np.int32)
    fed = np.full(ROWS, -1, np.int32)
    bias_ids, bias = np.full((ROWS, 4), vocab, np.int32), np.zeros((ROWS, 4), np.float32)
    for place, (prompt, out, edit) in enumerate(rows):
        known = [*prompt, *(token + vocab for token in out[:-1])]
        history[place, : len(known)] = known
        fed[place] = out[-1] if out else -1
        bias_ids[place, : len(edit["bias"])] = list(edit["bias"])
        bias[place, : len(edit["bias"])] = list(edit["bias"].values())
    penalties = [
        column([edit[name] for *_, edit in rows]) for name in ("presence", "frequency", "repetition")
    ]
    after = jit_edit(logits, fed, history, *penalties, bias_ids, bias)
    for place, (prompt, out, edit) in enumerate(rows):
        np.testing.assert_allclose(
            after[place], edited(logits[place], prompt, out, edit), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize(("vocab", "group"), [(7, None), (130, 2), (1500, 2)])
def test_logprobs_are_a_log_softmax(vocab: int, group: int | None) -> None:
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(ROWS, vocab)) * 4).astype(np.float32)
    tokens = rng.integers(0, vocab, size=ROWS + 2).astype(np.int32)
    found = jax.jit(partial(logprobs, group=group))(logits, tokens)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    chosen = exact[np.arange(ROWS), tokens[:ROWS]]
    np.testing.assert_allclose(found.chosen, chosen, atol=2e-5)
    assert found.ranks.tolist() == ((exact > chosen[:, None]).sum(axis=1) + 1).tolist()
    told = min(vocab, MAX_LOGPROBS)
    order = np.argsort(-logits, axis=1)[:, :told]
    assert found.top.shape == (ROWS, MAX_LOGPROBS)
    assert np.array_equal(found.top_ids[:, :told], order)
    np.testing.assert_allclose(found.top[:, :told], np.take_along_axis(exact, order, axis=1), atol=2e-5)
    assert (np.asarray(found.top_ids) < vocab).all()
    assert not np.isfinite(found.top[:, told:]).any()


@pytest.mark.parametrize("spread", [0.3, pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_a_threshold_takes_few_looks_at_the_vocabulary(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cost is passes over all weights; halving the bits of a float32 would take some thirty."""
    looks: list[int] = []
    measure = truncation._measure

    def counted(*args: Any) -> jax.Array:
        jax.debug.callback(lambda: looks.append(1))
        return measure(*args)

    monkeypatch.setattr(truncation, "_measure", counted)
    logits = np.random.default_rng(6).normal(size=(ROWS, 20_000)) * spread
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    for top_k, top_p in [(0, 0.5), (0, 0.9), (0, 0.99), (1000, 1.0), (7000, 1.0)]:
        looks.clear()
        row = column([top_k] * ROWS, jnp.int32), column([top_p] * ROWS)
        counting = jax.jit(partial(thresholds))  # not what jit keeps of another test
        jax.block_until_ready(counting(in_blocks(jnp.asarray(weights), 0.0), *row))
        jax.effects_barrier()
        assert 0 < len(looks) <= 14, (top_k, top_p, len(looks))
