"""Fakes for tests: a model whose tokens can be computed by hand, run over a page pool of plain integers.

It knows the messages of `core` and nothing of the scheduler that makes them, of devices or jax.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lamina_jax.core import MicrobatchPlan, Sampled, StepPlan


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """A model without weights: all tokens so far, as digits of a number, choose the next one.

    Each token counts by its place, so reading a wrong page or a wrong length shows.
    """

    vocab_size: int = 97

    def next_token(self, tokens: Sequence[int]) -> int:
        """The number with the digits token + 1 in base 31, mod 10007, mod V."""
        number = 0
        for token in tokens:
            number = (31 * number + token + 1) % 10007
        return number % self.vocab_size

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Collection[int] = ()) -> list[int]:
        """The greedy continuation of one prompt on its own, the stop token included."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_tokens:
            tokens.append(self.next_token(tokens))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]


@dataclass(frozen=True, slots=True)
class _Cached:
    """What one slot of the fake pool holds."""

    owner: int
    position: int
    token: int


class FakeRunner:
    """A `ModelRunner` that executes step plans in the order given, and checks what it reads.

    It holds the pages (slot -> token) and the last tokens of each microbatch, and it resolves
    `feedback` from them: tokens need not have been seen by the host. AssertionErrors name the
    request: a cached token that is not its own, feedback from another request's row, a slot out of
    the pool.
    """

    def __init__(self, model: FakeModel, *, num_pages: int, page_size: int) -> None:
        self._model = model
        self._page_size = page_size
        self._num_slots = num_pages * page_size
        self._pool: dict[int, _Cached] = {}
        self._owners: dict[str, int] = {}
        self._num_owners = 0
        self._num_steps = 0
        self._last: dict[int, tuple[tuple[str, ...], np.ndarray]] = {}

    def dispatch(self, plan: StepPlan) -> list[np.ndarray]:
        """Execute a step; what `read` takes."""
        self._num_steps += 1
        return [self._run_microbatch(microbatch) for microbatch in plan.microbatches]

    def read(self, step: list[np.ndarray]) -> list[Sampled]:
        """The tokens int32[B] that each microbatch of a dispatched step chose; -1 in padding rows."""
        return [Sampled(tokens=tokens) for tokens in step]

    def stats(self) -> dict[str, int]:
        """How many steps were dispatched."""
        return {"steps": self._num_steps}

    def _run_microbatch(self, plan: MicrobatchPlan) -> np.ndarray:
        chosen = np.full(plan.bucket[0], -1, np.int32)
        for row, request_id in enumerate(plan.request_ids):
            if plan.kind == "prefill" and not plan.context_lens[row]:
                self._num_owners += 1
                self._owners[request_id] = self._num_owners
            cached = self._read(plan, row)
            new = self._new_tokens(plan, row)
            self._append(plan, row, new)
            chosen[row] = self._model.next_token(cached + new)
        self._last[plan.microbatch] = plan.request_ids, chosen
        return chosen

    def _read(self, plan: MicrobatchPlan, row: int) -> list[int]:
        """The cached tokens of a row through its block table, each checked to be the request's own."""
        request_id = plan.request_ids[row]
        tokens = []
        for position in range(int(plan.context_lens[row])):
            place, offset = divmod(position, self._page_size)
            slot = int(plan.block_tables[row, place]) * self._page_size + offset
            found = self._pool.get(slot)
            message = f"request {request_id!r}: slot {slot} holds {found}, not its position {position}"
            assert found, message
            assert (found.owner, found.position) == (self._owners[request_id], position), message
            tokens.append(found.token)
        return tokens

    def _new_tokens(self, plan: MicrobatchPlan, row: int) -> list[int]:
        """The row's new tokens, from the plan or from this microbatch's previous step."""
        source = int(plan.feedback[row])
        if source < 0:
            count = int(plan.logits_at[row]) - row * plan.bucket[1] + 1
            return [int(token) for token in plan.tokens[row, :count]]
        request_ids, chosen = self._last[plan.microbatch]
        assert request_ids[source] == plan.request_ids[row], (
            f"request {plan.request_ids[row]!r} is fed the token of {request_ids[source]!r}"
        )
        return [int(chosen[source])]

    def _append(self, plan: MicrobatchPlan, row: int, tokens: Sequence[int]) -> None:
        owner = self._owners[plan.request_ids[row]]
        for i, token in enumerate(tokens):
            slot = int(plan.slots[row, i])
            assert 0 <= slot < self._num_slots, (
                f"request {plan.request_ids[row]!r}: slot {slot} is not in the pool of {self._num_slots}"
            )
            self._pool[slot] = _Cached(owner, int(plan.positions[row, i]), token)
