"""Ten steps of a tiny model: the loss falls, and a run that stopped goes on to the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig
from lamina_jax.training.documents import ASKED
from lamina_jax.training.loop import (
    Hyperparameters,
    Phase,
    Progress,
    Report,
    TrainState,
    learning_rate,
    share_done,
    weighted_loss,
)
from lamina_jax.training.run import Run, checkpoints, restore, save

HYPER = Hyperparameters(tokens_per_step=256, learning_rate=1e-2, warmup_steps=2)
PHASES = [Phase(32, minutes=0.1), Phase(16, minutes=4 / 60)]
"""Six steps and four, by `ticks`."""


def ticks() -> Callable[[], float]:
    """A clock that goes on by a second whenever somebody looks."""
    return itertools.count(0.0).__next__


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def new_run(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tiny_config: ModelConfig, texts: list[str]
) -> Callable[[str], Run]:
    """A run in a folder of that name, which has its tokenizer already."""
    base = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Run:
        (base / name).mkdir(exist_ok=True)
        tokenizer.save(str(base / name / "tokenizer.json"))
        return Run(base / name, tiny_config, texts, seed=1, hyper=HYPER)

    return make


@pytest.fixture(scope="module")
def whole(new_run: Callable[[str], Run]) -> tuple[TrainState, list[Report]]:
    """Ten steps without a stop."""
    reports: list[Report] = []
    return new_run("whole").train(PHASES, reports.append, ignore, clock=ticks()), reports


def test_ten_steps_lower_the_loss(whole: tuple[TrainState, list[Report]]) -> None:
    state, reports = whole
    assert reports[-1].loss < reports[0].loss - 0.2
    assert [report.length for report in reports] == [32] * 6 + [16] * 4
    assert reports[-1].share_done == 1.0
    assert state.progress == Progress(step=10, tokens=2560, seconds=10.0)


def test_a_stopped_run_goes_on_to_the_same_state(
    whole: tuple[TrainState, list[Report]], new_run: Callable[[str], Run]
) -> None:
    class Stop(Exception):
        pass

    def stop(report: Report) -> None:
        if report.progress.step == 8:
            raise Stop

    with pytest.raises(Stop):  # every step is written; the eighth is lost
        new_run("stopped").train(PHASES, stop, ignore, checkpoint_seconds=0.0, clock=ticks())
    run = new_run("stopped")
    assert run.state().progress.step == 7
    resumed = run.train(PHASES, ignore, ignore, clock=ticks())
    expected = whole[0]
    assert resumed.progress.step == expected.progress.step
    jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.moments, expected.moments)


def test_a_finished_run_does_no_more_steps(
    whole: tuple[TrainState, list[Report]], new_run: Callable[[str], Run]
) -> None:
    reports: list[Report] = []
    again = new_run("whole").train(PHASES, reports.append, ignore)
    assert not reports
    assert again.progress == whole[0].progress


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    def state(step: int) -> TrainState:
        params = nnx.State({"w": nnx.Param(jnp.full((2,), step, jnp.float32))})
        return TrainState(params, (), Progress(step=step, seconds=0.5))

    with checkpoints(tmp_path) as manager:
        assert restore(manager, state(0)) is None
        for step in (1, 2, 3, 3):
            save(manager, state(step))
        found = restore(manager, state(0))
        assert found is not None
        assert found.progress == Progress(step=3, seconds=0.5)
        np.testing.assert_array_equal(found.params["w"][...], [3.0, 3.0])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_the_learning_rate_warms_up_and_follows_the_clock() -> None:
    hyper = Hyperparameters(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    assert share_done([Phase(8, minutes=3.0), Phase(16, minutes=1.0)], 210.0) == pytest.approx(3.5 / 4)
    assert learning_rate(hyper, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(hyper, 9, 0.0) == pytest.approx(1.0)
    rates = [learning_rate(hyper, 100, done) for done in np.linspace(0, 1, 9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_the_loss_is_the_weighted_mean_and_recall_counts_asked_tokens() -> None:
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]], jnp.float32))
    targets = jnp.asarray([[1, 1, 0]], jnp.int32)
    weights = jnp.asarray([[1.0, ASKED, ASKED]], jnp.float32)
    loss, recall = weighted_loss(logits, targets, weights)
    expected = -(np.log(0.25) + ASKED * np.log(0.8) + ASKED * np.log(0.2)) / (1 + 2 * ASKED)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(recall) == 0.5
    assert np.isnan(weighted_loss(logits, targets, jnp.ones_like(weights))[1])
