"""The prompts of a prefill host: who is next, and the KV of each in main memory until nobody wants it.

It knows nothing of models, gRPC or sockets. Safe for use by several threads.
"""

from __future__ import annotations

import hmac
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lamina_jax.worker.lease import Refused

MOST_PROMPTS = 24
"""That a host holds; more are refused, and the engine goes elsewhere."""

Arrays = Sequence[np.ndarray]
"""What pages hold of some tokens of one layer: [T, 2, K, ...] each."""


class Prompt:
    """One prompt.

    Attributes:
        ticket: shown by whoever asks for its KV.
        tokens: int32[n].
        over: set when nobody wants it any more.
        reason: why.
    """

    def __init__(self, ticket: bytes, tokens: np.ndarray) -> None:
        self.ticket, self.tokens, self.reason = ticket, tokens, ""
        self.over = threading.Event()
        self._changed = threading.Condition()
        self._layers: list[list[np.ndarray]] = []
        self._done = 0
        self._hang_ups: list[Callable[[], None]] = []

    def keep(self, layers: Sequence[Arrays], count: int) -> None:
        """The KV of the next `count` tokens, in every layer; what is behind them in the arrays is padding."""
        start, length = self._done, len(self.tokens)
        if not self._layers:
            self._layers = [
                [np.empty((length, *array.shape[1:]), array.dtype) for array in arrays] for arrays in layers
            ]
        for mine, arrays in zip(self._layers, layers, strict=True):
            for whole, array in zip(mine, arrays, strict=True):
                whole[start : start + count] = array[:count]
        with self._changed:
            self._done += count
            self._changed.notify_all()

    def read(self, layer: int, heads: slice, positions: np.ndarray, seconds: float) -> list[np.ndarray]:
        """The bytes of what pages hold at int32[T] positions, for some KV heads; waits until it is there.

        Raises:
            Refused: the prompt is over, or not prefilled in time.
        """
        last = int(positions.max())
        with self._changed:
            if not self._changed.wait_for(lambda: self.over.is_set() or self._done > last, seconds):
                raise Refused(f"the prompt was not prefilled in {seconds:g} s")
            if self.over.is_set():
                raise Refused(self.reason)
            arrays = self._layers[layer]
        found = [np.ascontiguousarray(array[positions][:, :, heads]) for array in arrays]
        return [array.reshape(-1).view(np.uint8) for array in found]

    def attach(self, hang_up: Callable[[], None]) -> None:
        """Call `hang_up` when the prompt is over, at once if it is."""
        with self._changed:
            if not self.over.is_set():
                self._hang_ups.append(hang_up)
                return
        hang_up()

    def end(self, reason: str) -> None:
        """Nobody wants it any more, or it cannot be had; the first reason counts."""
        with self._changed:
            if self.over.is_set():
                return
            self.reason = reason
            self.over.set()
            self._layers.clear()
            hang_ups, self._hang_ups = self._hang_ups, []
            self._changed.notify_all()
        for hang_up in hang_ups:
            hang_up()


class Prompts:
    """All prompts that a host holds, in the order in which they came.

    Args:
        most_held: prompts whose KV is in main memory at once; others wait.
        max_tokens: of one prompt.
        vocab_size: V.
    """

    def __init__(self, most_held: int, max_tokens: int, vocab_size: int) -> None:
        self._most_held, self._max_tokens, self._vocab_size = most_held, max_tokens, vocab_size
        self._changed = threading.Condition()
        self._waiting: deque[Prompt] = deque()
        self._held: list[Prompt] = []
        self._closed = ""

    def submit(self, ticket: bytes, tokens: np.ndarray) -> Prompt:
        """Queue a prompt.

        Raises:
            Refused: there are too many, or the host is about to end.
            ValueError: it can never be prefilled here.
        """
        if not 0 < len(tokens) <= self._max_tokens:
            raise ValueError(f"a prompt of {len(tokens)} tokens, this host takes 1 .. {self._max_tokens}")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(f"token ids {tokens.min()} .. {tokens.max()} of {self._vocab_size}")
        with self._changed:
            if self._closed:
                raise Refused(self._closed)
            if len(self._waiting) + len(self._held) >= MOST_PROMPTS:
                raise Refused(f"it holds {MOST_PROMPTS} prompts already")
            prompt = Prompt(ticket, tokens)
            self._waiting.append(prompt)
            self._changed.notify_all()
        return prompt

    def next(self) -> Prompt | None:
        """Wait for the next prompt to be prefilled; None: the host is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_next())
            if self._closed:
                return None
            prompt = self._waiting.popleft()
            self._held.append(prompt)
            return prompt

    def _has_next(self) -> bool:
        return bool(self._waiting) and len(self._held) < self._most_held

    def find(self, ticket: bytes) -> Prompt:
        """The prompt that a ticket is for.

        Raises:
            Refused: there is none.
        """
        with self._changed:
            for prompt in (*self._waiting, *self._held):
                if hmac.compare_digest(prompt.ticket, ticket):
                    return prompt
        raise Refused("no prompt has this ticket: its engine has let go of it")

    def end(self, prompt: Prompt, reason: str) -> None:
        """Let go of a prompt."""
        prompt.end(reason)
        with self._changed:
            for prompts in (self._waiting, self._held):
                if prompt in prompts:
                    prompts.remove(prompt)
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Take no more, and let go of all."""
        with self._changed:
            self._closed = self._closed or reason
            prompts = [*self._waiting, *self._held]
            self._changed.notify_all()
        for prompt in prompts:
            self.end(prompt, reason)

    @property
    def held(self) -> int:
        """How many there are, those that wait included."""
        with self._changed:
            return len(self._waiting) + len(self._held)
