"""The prompts of a prefill host: in order, bounded, and let go of."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lamina_jax.prefill.prompts import MOST_PROMPTS, Prompt, Prompts
from lamina_jax.worker.lease import Refused

TOKENS = np.arange(5, dtype=np.int32)


def prompts(most_held: int = 2) -> Prompts:
    return Prompts(most_held, max_tokens=8, vocab_size=10)


def ticket(i: int = 0) -> bytes:
    return bytes([i] * 16)


def layers(start: int, count: int, padding: int = 0) -> list[list[np.ndarray]]:
    """Two layers of two heads of one number: 100 layer + 10 head + position, v like k."""
    at = np.arange(start, start + count + padding, dtype=np.float32)[:, None, None, None]
    heads = 10 * np.arange(2, dtype=np.float32)[None, None, :, None]
    return [[np.broadcast_to(at + heads + 100 * layer, (len(at), 2, 2, 1))] for layer in range(2)]


def read(prompt: Prompt, layer: int, heads: slice, positions: list[int], seconds: float = 5.0) -> np.ndarray:
    (found,) = prompt.read(layer, heads, np.array(positions, np.int32), seconds)
    return found.view(np.float32).reshape(len(positions), 2, -1)[:, 0]


def test_kv_is_read_by_layer_head_and_position_as_soon_as_it_is_there() -> None:
    prompt = Prompt(ticket(), TOKENS)
    prompt.keep(layers(0, 3, padding=2), 3)
    assert read(prompt, 1, slice(1, 2), [2, 0]).tolist() == [[112], [110]]
    found: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: found.append(read(prompt, 0, slice(0, 2), [4])))
    reader.start()
    reader.join(0.1)
    assert not found
    prompt.keep(layers(3, 2), 2)
    reader.join(5)
    assert found[0].tolist() == [[4, 14]]


def test_who_waits_for_a_prompt_that_is_over_is_told_why() -> None:
    prompt, hung_up = Prompt(ticket(), TOKENS), []
    prompt.attach(lambda: hung_up.append(1))
    threading.Timer(0.05, lambda: prompt.end("nobody wants it")).start()
    with pytest.raises(Refused, match="nobody wants it"):
        read(prompt, 0, slice(0, 1), [0])
    prompt.end("later")
    prompt.attach(lambda: hung_up.append(2))
    assert hung_up == [1, 2]
    with pytest.raises(Refused, match="not prefilled in 0"):
        read(Prompt(ticket(), TOKENS), 0, slice(0, 1), [0], seconds=0)


def test_prompts_come_in_order_while_there_is_room() -> None:
    held = prompts(most_held=1)
    first, second = held.submit(ticket(1), TOKENS), held.submit(ticket(2), TOKENS)
    assert held.next() is first
    taken: list[Prompt | None] = []
    waiting = threading.Thread(target=lambda: taken.append(held.next()))
    waiting.start()
    waiting.join(0.1)
    assert not taken
    held.end(first, "pulled")
    waiting.join(5)
    assert taken == [second]
    assert held.find(ticket(2)) is second
    with pytest.raises(Refused, match="no prompt has this ticket"):
        held.find(ticket(1))


def test_closing_lets_go_of_everything() -> None:
    held = prompts()
    prompt = held.submit(ticket(), TOKENS)
    held.close("shutting down")
    assert prompt.over.is_set()
    assert held.next() is None
    assert held.held == 0
    with pytest.raises(Refused, match="shutting down"):
        held.submit(ticket(), TOKENS)


def test_what_cannot_be_prefilled_is_refused() -> None:
    held = prompts()
    for wrong in (np.zeros(0, np.int32), np.zeros(9, np.int32), np.array([10]), np.array([-1])):
        with pytest.raises(ValueError, match=r"of 10|takes 1"):
            held.submit(ticket(), wrong)
    for i in range(MOST_PROMPTS):
        held.submit(ticket(i), TOKENS)
    with pytest.raises(Refused, match="already"):
        held.submit(ticket(99), TOKENS)
