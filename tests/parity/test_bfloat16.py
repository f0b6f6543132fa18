"""bfloat16, teacher-forced, against the float32 of transformers: a trained model as each of the families.

`-s` prints the table of docs/models.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forward import RELATIVE, Forward
from variants import VARIANTS, save_variant

REFERENCE = Path(__file__).parent.parent / "fixtures" / "parity" / "bfloat16.npz"

LARGEST, TYPICAL = 0.06, 0.01
"""How far a bfloat16 logit may be off: at most, of the largest logit; root mean square, of their spread."""

COMPARED = 4
"""Texts of which all logits are compared."""

RESOLUTION = 2.0**-8
"""Logits whose relative difference is smaller are the same number in bfloat16."""


@pytest.mark.slow
def test_the_best_token_is_the_reference_s(tmp_path: Path) -> None:
    """In 99 % of all positions; of each family a little less is enough, near-ties being what they are."""
    agrees = [check(family, tmp_path / family) for family in VARIANTS]
    assert min(agrees) > 0.985
    assert np.mean(agrees) > 0.99


def check(family: str, folder: Path) -> float:
    """The share of positions whose best token is the reference's; the logits are within the tolerance."""
    folder.mkdir()
    stored = np.load(REFERENCE)
    tokens, best, top, gap = (stored[f"{family}_{key}"] for key in ("tokens", "best", "top", "gap"))
    save_variant(family, folder)
    exact = logits_of(folder, "float32", tokens[:COMPARED])
    at_best = np.take_along_axis(exact, best[:COMPARED, :, None].astype(int), -1)[..., 0]
    assert np.abs(at_best - top[:COMPARED]).max() <= RELATIVE * np.abs(top).max()

    rounded = logits_of(folder, "bfloat16", tokens)
    errors = rounded[:COMPARED] - exact
    largest, typical = np.abs(errors).max() / np.abs(exact).max(), np.sqrt(np.mean(errors**2)) / exact.std()
    agrees = rounded.argmax(-1) == best
    clear = gap > RESOLUTION * np.abs(top)
    print(
        f"\n{family:8} {agrees.size:5} positions: {agrees.mean():7.2%} the same best token "
        f"(transformers' bfloat16: {stored[f'{family}_agreement']:.2%}), {agrees[clear].mean():7.2%} of "
        f"{clear.sum()} clear ones; logits off by {typical:.2%} rms, {largest:.2%} at most"
    )
    assert agrees.mean() > stored[f"{family}_agreement"]
    assert agrees[clear].mean() > 0.995
    assert largest <= LARGEST
    assert typical <= TYPICAL
    return float(agrees.mean())


def logits_of(folder: Path, dtype: str, tokens: np.ndarray) -> np.ndarray:
    """float32[texts, T, V]"""
    texts, length = tokens.shape
    forward = Forward(folder, length, "out_in", dtype)
    return np.stack([forward.last_logits(tokens[i].astype(np.int32), length) for i in range(texts)])
