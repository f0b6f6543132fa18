"""Fakes for tests: a model whose tokens can be computed by hand, run over workers with pages of plain
integers.

It knows the messages of `core` and nothing of the scheduler that makes them, of devices or jax.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lamina_jax.core import MAX_LOGPROBS, MicrobatchPlan, Sampled, StepPlan, TokenLogprobs
from lamina_jax.pool.metadata import StepMetadata
from lamina_jax.pool.partition import Partition, PartitionKind


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


class _Cached(NamedTuple):
    """What one slot of a fake worker holds."""

    owner: int
    position: int
    token: int


class _Share(NamedTuple):
    """One row as one worker sees it: the worker's slots, and that row of all that it is told."""

    pool: dict[int, _Cached]
    told: StepMetadata


class FakeRunner:
    """A `ModelRunner` that executes step plans in the order given, and checks what it reads.

    It holds each worker's pages (slot -> token) and the last tokens of each microbatch, and it resolves
    `feedback` from them: tokens need not have been seen by the host. A worker reads and keeps what
    `Partition.split` tells it, and the shares of a row are merged by place. AssertionErrors name the
    request: a cached token that is missing, read twice or not its own, feedback from another request's
    row, a token that is kept by no worker or by two.
    """

    def __init__(
        self,
        model: FakeModel,
        *,
        num_pages: int,
        page_size: int,
        partition: PartitionKind = "heads",
        workers: int = 1,
    ) -> None:
        self._model = model
        self._partition = Partition(partition, workers, num_pages, page_size)
        self._pools: list[dict[int, _Cached]] = [{} for _ in range(workers)]
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

    def new_owner(self) -> int:
        """Of KV that is brought from elsewhere: for `bring`, and at last for `own`."""
        self._num_owners += 1
        return self._num_owners

    def bring(self, owner: int, pages: Sequence[int], position: int, token: int) -> None:
        """Keep one token in the page, of a request's `pages`, that its position is in."""
        place, offset = divmod(position, self._partition.page_size)
        worker, page = divmod(pages[place], self._partition.num_pages)
        slot = page * self._partition.page_size + offset
        self._pools[worker][slot] = _Cached(owner, position, token)

    def own(self, request_id: str, owner: int) -> None:
        """What `owner` was brought is the request's."""
        self._owners[request_id] = owner

    def _run_microbatch(self, plan: MicrobatchPlan) -> np.ndarray:
        chosen = np.full(plan.bucket[0], -1, np.int32)
        for row, shares in enumerate(self._shares(plan)):
            request_id = plan.request_ids[row] if row < len(plan.request_ids) else ""
            if not request_id:
                assert not any(self._kept(share) for share in shares), f"padding row {row} is kept"
                continue
            if plan.kind == "prefill" and not plan.context_lens[row]:
                self.own(request_id, self.new_owner())
            cached = self._cached_tokens(request_id, int(plan.context_lens[row]), shares)
            new = self._new_tokens(plan, row)
            self._append(request_id, new, shares)
            chosen[row] = self._model.next_token(cached + new)
        self._last[plan.microbatch] = plan.request_ids, chosen
        return chosen

    def _shares(self, plan: MicrobatchPlan) -> list[list[_Share]]:
        """For each row, the workers that take part in it."""
        by_worker = [
            [_Share(self._pools[worker], StepMetadata(*row)) for row in zip(*told, strict=True)]
            for worker, _, told in self._partition.split(plan)
        ]
        if self._partition.kind == "requests":
            return [[row] for rows in by_worker for row in rows]
        return [list(row) for row in zip(*by_worker, strict=True)]

    def _kept(self, share: _Share) -> list[int]:
        """Which of the row's tokens the worker keeps."""
        return self._partition.kept(share.told.slots).tolist()

    def _cached_tokens(self, request_id: str, length: int, shares: Sequence[_Share]) -> list[int]:
        """A row's cached tokens, merged by place, each checked to be the request's own."""
        merged: dict[int, int] = {}
        for share in shares:
            assert share.told.context_lens == length
            places = share.told.page_index
            assert (np.diff(places) > 0).all(), f"page_index {places} does not increase"
            for slot, position in self._slots_read(share):
                found = share.pool.get(slot)
                message = f"request {request_id!r}: slot {slot} holds {found}, not its position {position}"
                assert found, message
                assert (found.owner, found.position) == (self._owners[request_id], position), message
                assert position not in merged, f"request {request_id!r}: position {position} is read twice"
                merged[position] = found.token
        missing = set(range(length)) - set(merged)
        assert not missing, f"request {request_id!r}: no worker reads positions {sorted(missing)}"
        return [merged[position] for position in range(length)]

    def _slots_read(self, share: _Share) -> Iterator[tuple[int, int]]:
        """(slot, position) of each cached token that a worker's pages of a row should hold."""
        size, length = self._partition.page_size, int(share.told.context_lens)
        tables = share.told.block_tables.tolist(), share.told.page_index.tolist()
        for page, place in zip(*tables, strict=True):
            for offset in range(min(size, length - place * size)):
                yield page * size + offset, place * size + offset

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

    def _append(self, request_id: str, tokens: Sequence[int], shares: Sequence[_Share]) -> None:
        kept = sorted(i for share in shares for i in self._kept(share))
        assert kept == list(range(len(tokens))), (
            f"request {request_id!r}: of {len(tokens)} new tokens, numbers {kept} are kept"
        )
        for share in shares:
            for i in self._kept(share):
                position = int(share.told.positions[i])
                share.pool[int(share.told.slots[i])] = _Cached(self._owners[request_id], position, tokens[i])


@dataclass(frozen=True)
class QuickModel:
    """A model whose next token follows from the last one and its position alone, for all rows at once.

    Attributes:
        words: int32[n]: the ids that it generates.
    """

    words: np.ndarray

    def next_tokens(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int32[B]: what follows `tokens` int32[B] at `positions` int32[B]."""
        return self.words[(tokens + positions) % len(self.words)]

    def generate(self, prompts: np.ndarray, max_tokens: int) -> np.ndarray:
        """int32[B, max_tokens]: the continuations of prompts int32[B, Q]."""
        last, length = prompts[:, -1], prompts.shape[1]
        columns = []
        for position in range(length - 1, length - 1 + max_tokens):
            last = self.next_tokens(last, np.full_like(last, position))
            columns.append(last)
        return np.stack(columns, axis=1)


class QuickRunner:
    """A `ModelRunner` that takes next to no time: what is left is the engine's own.

    It looks at tokens, positions and feedback, and at no page. Log-probabilities are made up.
    """

    def __init__(self, model: QuickModel) -> None:
        self._model = model
        self._last: dict[int, np.ndarray] = {}

    def dispatch(self, plan: StepPlan) -> list[Sampled]:
        """Execute a step; what `read` takes."""
        return [self._run_microbatch(microbatch) for microbatch in plan.microbatches]

    def read(self, step: list[Sampled]) -> list[Sampled]:
        """What came of each microbatch."""
        return step

    def stats(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def _run_microbatch(self, plan: MicrobatchPlan) -> Sampled:
        tokens, positions = (
            plan.tokens.reshape(-1)[plan.logits_at],
            plan.positions.reshape(-1)[plan.logits_at],
        )
        if plan.microbatch in self._last:
            fed = self._last[plan.microbatch]
            tokens = np.where(plan.feedback >= 0, fed[np.minimum(plan.feedback, len(fed) - 1)], tokens)
        chosen = self._last[plan.microbatch] = self._model.next_tokens(tokens, positions)
        told = plan.sampling is not None and plan.sampling.logprobs
        return Sampled(tokens=chosen, logprobs=_made_up(chosen) if told else None)


def _made_up(chosen: np.ndarray) -> TokenLogprobs:
    """Each chosen token is the best of the ids from it on."""
    places = np.arange(MAX_LOGPROBS, dtype=np.int32)
    top = np.tile(-1 - places.astype(np.float32), (len(chosen), 1))
    return TokenLogprobs(
        chosen=top[:, 0], ranks=np.ones_like(chosen), top_ids=np.maximum(chosen[:, None] - places, 0), top=top
    )
