"""A long text as windows that a model of limited length reads one by one; numbers only, no model.

Each window but the first begins before the tokens that it counts, so that these are predicted from something;
every token of the text but the first is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """`tokens` are read, and the last `counted` of them are predicted."""

    tokens: list[int]
    counted: int


def windows(tokens: Sequence[int], context: int, stride: int) -> list[Window]:
    """Windows of at most `context` tokens that begin `stride` tokens apart.

    Raises:
        ValueError: fewer than two tokens, or a stride that would leave tokens out.
    """
    if len(tokens) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens has none to predict: give a longer one")
    if not 1 <= stride <= context - 1:
        raise ValueError(f"stride={stride} must be in 1 .. context - 1 = {context - 1}")
    found, done = [], 1  # nothing predicts the first
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        found.append(Window(list(tokens[begin:end]), end - done))
        done = end
        if end == len(tokens):
            break
    return found
