"""Our logits and greedy tokens against those of transformers, stored in tests/fixtures/parity."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward import Forward, assert_close

from lamina_jax import LLM, SamplingParams

FIXTURES = Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
PROMPTS = range(4)
NEAR_TIE = 1e-3
"""Gap of the reference's two best logits below which either may be chosen."""


def reference(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / case / "reference.npz"))


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    """At the last positions of prompts of four lengths."""
    expected = reference(case)
    longest = max(len(expected[f"prompt_{i}"]) for i in PROMPTS)
    forward = Forward(FIXTURES / case, longest, "out_in" if CASES.index(case) % 2 else "in_out")
    for i in PROMPTS:
        logits = expected[f"logits_{i}"]
        assert_close(forward.last_logits(expected[f"prompt_{i}"], len(logits)), logits)


QUICK = {
    ("mistral_window", "disaggregated"),
}
"""Engines of the default run; the others are `slow`."""


def engines() -> list[Any]:
    """Every case on both placements."""
    pairs = itertools.product(CASES, ("disaggregated", "collocated"))
    return [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("case", "placement"), engines())
def test_greedy_tokens(case: str, placement: Any) -> None:
    """64 tokens after prompts shorter and longer than a page, a chunk, a window; all decoded together."""
    expected = reference(case)
    llm = LLM(
        str(FIXTURES / case),
        placement=placement,
        max_model_len=200,
        max_num_seqs=len(PROMPTS),
        max_prefill_tokens=(32, 48, 130)[CASES.index(case) % 3],
        page_size=(4, 8, 16, 64)[CASES.index(case) % 4],
    )
    prompts = [expected[f"prompt_{i}"].tolist() for i in PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    for i, output in enumerate(outputs):
        check_tokens(
            output.outputs[0].token_ids, expected[f"tokens_{i}"], expected[f"gaps_{i}"], f"{case}/{i}"
        )


def check_tokens(found: list[int], expected: np.ndarray, gaps: np.ndarray, name: str) -> None:
    """Equal up to a near-tie of the reference: from there on the two texts differ by right."""
    assert len(found) == len(expected)
    differ = np.flatnonzero(np.asarray(found) != expected)
    if not len(differ):
        return
    first = int(differ[0])
    told = (
        f"{name}: token {first} is {found[first]}, the reference has {expected[first]}, gap {gaps[first]:.1e}"
    )
    print(told)
    assert gaps[first] < NEAR_TIE, told


def test_the_check_tells_a_near_tie_from_an_error() -> None:
    expected, gaps = np.array([1, 2, 3]), np.array([1.0, 1e-4, 1.0])
    check_tokens([1, 2, 3], expected, gaps, "same")
    check_tokens([1, 9, 9], expected, gaps, "near-tie")
    with pytest.raises(AssertionError, match=r"token 2 is 9, the reference has 3"):
        check_tokens([1, 2, 9], expected, gaps, "error")
