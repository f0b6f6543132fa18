"""What the sampler is told of rows: random numbers that reproduce, bans, histories, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.core import Request, SamplingParams
from lamina_jax.engine.sampling_rows import (
    MAX_BIASED,
    SampledRow,
    check_edits,
    history_sizes,
    sampling_rows,
    uniform,
)

VOCAB = 50


def a_row(
    index: int = 0, generated: tuple[int, ...] = (), seed: int = 0, choice: int = 0, **params: Any
) -> Any:
    request = Request(
        request_id="r",
        prompt_token_ids=(3, 4, 3),
        sampling=SamplingParams(max_tokens=99, **params),
        stop_token_ids=frozenset({7, 9}),
        seed=seed,
        choice=choice,
    )
    return SampledRow(request, index, generated)


def of(*rows: SampledRow, size: int = 4, history: int = 96) -> Any:
    return sampling_rows(rows, size, vocab_size=VOCAB, history=history)


def test_greedy_rows_need_nothing() -> None:
    assert of(a_row(temperature=0), a_row(temperature=0, min_tokens=2, index=2)) is None
    assert of(a_row(temperature=0), a_row(temperature=0, logprobs=0)).logprobs
    assert of(a_row(temperature=0), a_row(temperature=0, min_tokens=2, index=1)).edits is not None


def test_rows_and_padding() -> None:
    rows = of(a_row(temperature=0.5, top_k=-1, top_p=0.25, min_p=0.125), a_row(top_k=10**9))
    assert rows.temperature.tolist() == [0.5, 1, 0, 0]
    assert rows.top_k.tolist() == [0, VOCAB, 0, 0]
    assert rows.top_p.tolist() == [0.25, 1, 1, 1]
    assert rows.min_p.tolist() == [0.125, 0, 0, 0]
    assert rows.edits is None
    assert not rows.logprobs
    kinds = {name: getattr(rows, name).dtype.name for name in ("temperature", "top_k", "uniform")}
    assert kinds == {"temperature": "float32", "top_k": "int32", "uniform": "float32"}


def test_uniforms_do_not_change_between_versions() -> None:
    """Seeds must reproduce after an upgrade, too."""
    assert [uniform(*key) for key in [(0, 0, 0), (42, 0, 1), (42, 1, 1), (2**64 - 1, 0, 64)]] == PINNED


PINNED = [0.011546730995178223, 0.1892455816268921, 0.8163920640945435, 0.6958661079406738]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 127), st.integers(0, 10**6))
def test_a_uniform_depends_on_seed_choice_and_index_alone(seed: int, choice: int, index: int) -> None:
    first = uniform(seed, choice, index)
    assert 0 <= first < 1
    assert float(np.float32(first)) == first
    me = a_row(index, seed=seed, choice=choice)
    other = a_row(index + 1, seed=seed, choice=choice)
    assert of(me).uniform[0] == of(other, other, me, size=8).uniform[2] == np.float32(first)


def test_uniforms_are_uniform_and_unlike() -> None:
    keys = [(seed, choice, index) for seed in range(20) for choice in range(5) for index in range(200)]
    values = np.array([uniform(*key) for key in keys])
    assert len(set(values.tolist())) > 0.999 * len(values)
    counts = np.bincount((values * 20).astype(int), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # the 0.1 % quantile of 19 degrees of freedom
    along = values.reshape(-1, 200)
    assert abs(np.corrcoef(along[:, :-1].ravel(), along[:, 1:].ravel())[0, 1]) < 0.03


def test_end_ids_are_banned_until_min_tokens() -> None:
    early = of(a_row(index=1, min_tokens=2, logit_bias={7: 5.0})).edits
    banned = dict(zip(early.bias_ids[0, :3].tolist(), early.bias[0, :3].tolist(), strict=True))
    assert set(early.bias_ids[0, :3].tolist()) == {7, 9}
    assert banned[9] == -np.inf
    assert early.bias[0, :3][early.bias_ids[0, :3] == 7].sum() == -np.inf
    assert (early.bias_ids[0, 3:] == VOCAB).all()
    late = of(a_row(index=2, min_tokens=2, logit_bias={7: 5.0})).edits
    assert late.bias_ids[0, :2].tolist() == [7, VOCAB]
    assert late.bias[0, :2].tolist() == [5.0, 0.0]


def test_histories_tell_prompt_from_generated() -> None:
    edits = of(a_row(2, (5, 3), presence_penalty=0.5), a_row(), a_row(repetition_penalty=1.5)).edits
    assert edits.history.shape == (4, 96)
    assert edits.history[0, :6].tolist() == [3, 4, 3, 5 + VOCAB, 3 + VOCAB, -1]
    assert (edits.history[1] == -1).all()
    assert edits.presence.tolist() == [0.5, 0, 0, 0]
    assert edits.repetition.tolist() == [1, 1, 1.5, 1]
    assert of(a_row(logit_bias={1: 1.0})).edits.history.shape == (4, 0)


def test_history_sizes_are_few_and_reach_the_longest() -> None:
    assert history_sizes(96) == (0, 96)
    assert history_sizes(4096) == (0, 512, 4096)
    assert history_sizes(40960) == (0, 512, 4096, 32768, 40960)


def test_more_bans_than_fit_are_refused() -> None:
    def request(ends: int) -> Request:
        sampling = SamplingParams(min_tokens=1, logit_bias={0: 1.0})
        return Request(
            request_id="r", prompt_token_ids=(1,), sampling=sampling, stop_token_ids=frozenset(range(ends))
        )

    check_edits(request(MAX_BIASED - 1))
    assert sampling_rows([SampledRow(request(MAX_BIASED - 1), 0)], 1, vocab_size=1000, history=9) is not None
    with pytest.raises(ValueError, match="logit_bias has 1 entries and min_tokens bans 320 end ids"):
        check_edits(request(MAX_BIASED))
