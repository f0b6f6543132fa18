"""The training loop: AdamW over the plain reading of a model, in phases of growing length.

A phase lasts a number of minutes, and the learning rate follows the share of the whole plan that has
passed; so training ends in time on any machine. This module knows nothing of where documents come from,
of files, or of what is printed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from lamina_jax.models import as_function
from lamina_jax.training.documents import ASKED, Batch

Params = Any
"""A model's parameters, an `nnx.State`."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How the loop trains.

    A step takes as many sequences as make `tokens_per_step`, and at least `sequences_per_step`, so that
    long ones too are both text and recall documents.
    """

    tokens_per_step: int = 2048
    sequences_per_step: int = 2
    learning_rate: float = 1e-3
    final_share: float = 0.04
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0


class Phase(NamedTuple):
    """Train at `length` tokens for so many minutes."""

    length: int
    minutes: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands: steps and tokens done, and seconds spent."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds."""

    params: Params
    moments: Any
    progress: Progress


@dataclass(frozen=True)
class Report:
    """After a step: the length of its phase, the loss, the rate, and the share of asked tokens it got right
    (NaN where none was asked)."""

    progress: Progress
    length: int
    loss: float
    recall: float
    learning_rate: float
    share_done: float


def optimiser(hyper: Hyperparameters) -> optax.GradientTransformation:
    """AdamW without the learning rate; biases and norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(hyper.clip),
        optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2),
        optax.add_decayed_weights(
            hyper.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        ),
    )


def initial_state(model: nnx.Module, hyper: Hyperparameters) -> TrainState:
    _, params = as_function(model)
    return TrainState(params, optimiser(hyper).init(params), Progress())


def train(
    model: nnx.Module,
    state: TrainState,
    phases: list[Phase],
    batch: Callable[[int, int, int], Batch],
    hyper: Hyperparameters,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[TrainState, Report]]:
    """Trains from `state` through what is left of `phases`; yields after every step.

    Args:
        model: gives the definition; its own parameters are not touched.
        batch: (step, B, length) -> Batch, the same for the same step.
        clock: in seconds.
    """
    step = jax.jit(_make_step(model, hyper), donate_argnums=(0, 1))
    # The step donates its arguments; the caller's arrays stay whole.
    params, moments = jax.tree.map(jnp.copy, (state.params, state.moments))
    progress = state.progress
    while length := length_at(phases, progress.seconds):
        started = clock()
        rate = learning_rate(hyper, progress.step, share_done(phases, progress.seconds))
        data = batch(progress.step, max(hyper.sequences_per_step, hyper.tokens_per_step // length), length)
        params, moments, loss, recall = step(
            params, moments, data.tokens, data.positions, data.weights, np.float32(rate)
        )
        loss, recall = float(loss), float(recall)
        progress = Progress(
            step=progress.step + 1,
            tokens=progress.tokens + data.positions.size,
            seconds=progress.seconds + clock() - started,
        )
        report = Report(progress, length, loss, recall, rate, share_done(phases, progress.seconds))
        yield TrainState(params, moments, progress), report


def length_at(phases: list[Phase], seconds: float) -> int | None:
    """The length of the phase in which so much time has been spent; None behind the last one."""
    ends = accumulate(60 * phase.minutes for phase in phases)
    return next((phase.length for phase, end in zip(phases, ends, strict=True) if seconds < end), None)


def share_done(phases: list[Phase], seconds: float) -> float:
    """The share of the whole plan that has passed, in [0, 1]."""
    return min(1.0, seconds / sum(60 * phase.minutes for phase in phases))


def learning_rate(hyper: Hyperparameters, step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine over the plan down to `final_share` of the peak."""
    cosine = hyper.final_share + (1 - hyper.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return hyper.learning_rate * cosine * min(1.0, (step + 1) / hyper.warmup_steps)


def _make_step(model: nnx.Module, hyper: Hyperparameters) -> Callable[..., Any]:
    (fn, _), transform = as_function(model), optimiser(hyper)

    def loss_of(params: Params, tokens: Array, positions: Array, weights: Array) -> tuple[Array, Array]:
        every = jnp.arange(positions.shape[1], dtype=jnp.int32)
        logits = jax.vmap(lambda t, p: fn(params, t, p, every))(tokens[:, :-1], positions)
        return weighted_loss(logits, tokens[:, 1:], weights)

    def step(
        params: Params, moments: Any, tokens: Array, positions: Array, weights: Array, rate: Array
    ) -> tuple[Params, Any, Array, Array]:
        (loss, recall), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, tokens, positions, weights
        )
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer array's power
            updates, moments = transform.update(gradients, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, moments, loss, recall

    return step


def weighted_loss(
    logits: Float[Array, "B S V"], targets: Int[Array, "B S"], weights: Float[Array, "B S"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted mean cross entropy in nats, and the share of asked tokens that are the best guess.

    The share is NaN where nothing is asked.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, axis=-1) == targets) & (weights >= ASKED)
    recall = jnp.sum(right).astype(jnp.float32) / jnp.sum(weights >= ASKED).astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights), recall
