"""The picture of a cut: every array that leaves a slice once, with its bytes; the same each time."""

from __future__ import annotations

import re

import jax.numpy as jnp
import pytest
from toy_models import Block, decoder_block, inputs, model, parallel_block, two_in_parallel, weights

from lamina_jax import slice_at_attention
from lamina_jax.slicing import Sliced

ARROW = re.compile(r'^    (\w+) (-->|==>|-\.->)\|"(.*)"\| (\w+)$')


def cut(block: Block, layers: int) -> Sliced:
    return slice_at_attention(model(block), weights(layers), *inputs())


def arrows(picture: str) -> list[tuple[str, str, str, str]]:
    """(from, arrow, to, label), one for every array of a label."""
    found = [match.groups() for line in picture.splitlines() if (match := ARROW.match(line))]
    return [(tail, arrow, head, label) for tail, arrow, text, head in found for label in text.split("<br>")]


@pytest.mark.parametrize("block", [decoder_block, parallel_block, two_in_parallel])
def test_every_array_stands_once_with_its_bytes(block: Block) -> None:
    sliced = cut(block, 2)
    drawn = arrows(sliced.draw())
    for i, (attention, carried) in enumerate(zip(sliced.attentions, sliced.carried, strict=True)):
        on = [
            label for tail, arrow, _, label in drawn if arrow == "==>" and tail.startswith(f"slice{i}stage")
        ]
        assert sorted(on) == sorted(f"f32[{','.join(map(str, a.shape))}] {4 * a.size:,} B" for a in carried)
        wire = [
            label for tail, arrow, head, label in drawn if arrow == "-.->" and f"attention{i}" in (tail, head)
        ]
        sizes = [
            f"{name} f32[{','.join(map(str, a.shape))}] {4 * a.size:,} B" for name, a in _qkvo(attention)
        ]
        assert sorted(wire) == sorted(sizes)
    assert len([arrow for _, arrow, *_ in drawn if arrow == "-.->"]) == 4 * len(sliced.attentions)


def _qkvo(attention):
    return [(name, getattr(attention, name)) for name in "qkvo"]


def test_arrows_join_nodes_that_are_drawn_and_go_forwards() -> None:
    picture = cut(two_in_parallel, 2).draw()
    place = {name: i for i, name in enumerate(re.findall(r"^    (\w+)[\[(]", picture, re.MULTILINE))}
    for tail, arrow, head, _ in arrows(picture):
        assert {tail, head} <= place.keys()
        if arrow != "-.->":
            assert place[tail] < place[head]


def test_the_same_function_gives_the_same_picture() -> None:
    first, again = cut(decoder_block, 2).draw(), cut(decoder_block, 2).draw()
    assert first == again
    assert first.splitlines()[0] == "flowchart TD"


def test_without_attention_there_is_one_box() -> None:
    picture = slice_at_attention(jnp.sin, jnp.ones(3)).draw()
    assert picture.splitlines() == [
        "flowchart TD",
        '    subgraph slice0["slice 0"]',
        '    slice0stage1["stage 1<br>operators: 1"]',
        "    end",
    ]
