"""What `python -m lamina_jax.bench aot` compiles. No jax here."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """One side of a model's decode step on devices of one topology.

    Attributes:
        side: a key of `lamina_jax.aot.sides.SIDES`.
        model: a key of `lamina_jax.models.shapes.SHAPES`.
        topology: the name of a `lamina_jax.aot.devices.Topology`.
    """

    side: str
    model: str
    topology: str

    def __str__(self) -> str:
        return " ".join(self)


def _cases(side: str, on: dict[str, str]) -> list[Case]:
    return [Case(side, model, topology) for model, names in on.items() for topology in names.split()]


CASES = [
    *_cases(
        "compute",
        {
            "qwen3-0.6b": "v5e:2x2 v6e:2x2 v5p:2x2x1 h100:1",
            "llama3-8b": "v5e:2x2 v5e:2x4/1 v6e:2x2 v5p:2x2x1 h100:2 h100:2x1/1",
            "llama3-70b": "v5e:2x4 v5e:4x4 v6e:2x4 v6e:4x4 v5p:2x2x1 v5p:2x2x2 h100:4 h100:2x8",
        },
    ),
    *_cases(
        "sampler",
        {
            "qwen3-0.6b": "v5e:2x2 h100:4",
            "llama3-70b": "v5e:4x4 v6e:2x4 v5p:2x2x2 h100:2x8",
        },
    ),
    *_cases(
        "memory",
        {
            "qwen3-0.6b": "v5e:2x2 v6e:1x1 h100:1 h20:1 l40s:1",
            "llama3-8b": "v5e:2x2 v5e:2x4/2 v6e:1x1 h100:1 h100:2x1/2 h20:1 l40s:1",
            "llama3-70b": "v5e:1x1 v5e:2x2 v5e:2x4 v6e:2x2 h100:1 h20:1 l40s:2",
        },
    ),
    *_cases("collocated", {"qwen3-0.6b": "v5e:2x2 v6e:2x2 h100:2"}),
]
"""All three models on both sides; 2x4, 4x4, 2x2x2 and 2x8 span hosts; of 2x4 and 2x1 either side has a half.
Two are there to be refused."""


def chosen(only: list[str]) -> list[Case]:
    """The cases whose names contain all of the words of one of `only`, as in "memory h100"; all, if there are
    none.

    Raises:
        ValueError: words that no case has.
    """
    for words in only:
        if not any(_has(case, words) for case in CASES):
            raise ValueError(f"no case has {words!r} in its name; one is {str(CASES[0])!r}")
    return [case for case in CASES if not only or any(_has(case, words) for words in only)]


def _has(case: Case, words: str) -> bool:
    return all(word in str(case) for word in words.split())
