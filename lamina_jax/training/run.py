"""One training run in a folder: its tokenizer, its checkpoints by orbax, and going on where it stopped.

This module ties corpus, documents, loop and checkpoints together; it prints nothing, and pickles nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig, RopeConfig
from lamina_jax.training.documents import DocumentMaker, tokenizer_text
from lamina_jax.training.initial import initial_model
from lamina_jax.training.loop import (
    Hyperparameters,
    Phase,
    Progress,
    Report,
    TrainState,
    initial_state,
    train,
)
from lamina_jax.training.tokenizer import train_tokenizer

BUNDLED = ModelConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=2048,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100_000.0),
    tie_embeddings=True,
    dtype="bfloat16",
)
"""The shape of the model that comes with the package: 3.5 M parameters."""


class Run:
    """A run below `folder`. The first one there trains the tokenizer; later ones take it up again.

    Args:
        folder: holds `tokenizer.json` and the checkpoints.
        config: the model's shape; it must stay the same for one folder.
        texts: the corpus, a text per file.
        seed: of weights and documents.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        texts: Sequence[str],
        *,
        seed: int = 0,
        hyper: Hyperparameters | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config, self.texts, self.seed = folder, config, texts, seed
        self.hyper = hyper or Hyperparameters()
        self.tokenizer = self._tokenizer(folder / "tokenizer.json")
        self.initial = initial_model(config, seed)

    def state(self) -> TrainState:
        """The newest checkpoint's, or the initial one."""
        initial = initial_state(self.initial, self.hyper)
        with checkpoints(self.folder / "checkpoints") as manager:
            return restore(manager, initial) or initial

    def model(self, state: TrainState) -> nnx.Module:
        """The model that `state` has reached, its weights rounded to the checkpoint's dtype."""
        dtype = jnp.dtype(self.config.dtype)
        rounded = jax.tree.map(lambda value: value.astype(dtype).astype(value.dtype), state.params)
        graph, _ = nnx.split(self.initial, nnx.Param)
        return nnx.merge(graph, rounded)

    def train(
        self,
        phases: list[Phase],
        on_step: Callable[[Report], None],
        on_checkpoint: Callable[[TrainState, Report], None],
        checkpoint_seconds: float = 240.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> TrainState:
        """Trains through `phases` from the newest checkpoint on, writing one every few minutes."""
        maker = DocumentMaker(self.texts, self.tokenizer, self.config.max_position, self.seed)
        state, saved = self.state(), time.monotonic()
        with checkpoints(self.folder / "checkpoints") as manager:
            for reached, report in train(self.initial, state, phases, maker.batch, self.hyper, clock):
                state = reached
                on_step(report)
                if time.monotonic() - saved > checkpoint_seconds:
                    save(manager, state)
                    on_checkpoint(state, report)
                    saved = time.monotonic()
            save(manager, state)
        return state

    def _tokenizer(self, path: Path) -> Tokenizer:
        if path.exists():
            return Tokenizer.from_file(str(path))
        tokenizer = train_tokenizer(tokenizer_text(self.texts, self.seed), self.config.vocab_size)
        tokenizer.save(str(path))
        return tokenizer


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The newest two checkpoints of a run below `folder`; to be used as a context manager."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Writes `state`, unless its step is the newest one written."""
    arrays = ocp.args.StandardSave({"params": state.params, "moments": state.moments})
    progress = ocp.args.JsonSave(asdict(state.progress))
    manager.save(state.progress.step, args=ocp.args.Composite(arrays=arrays, progress=progress))


def restore(manager: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
    """The newest state, shaped as `like`; None where nothing was written yet."""
    if manager.latest_step() is None:
        return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like.params, "moments": like.moments})
    wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
    found = manager.restore(manager.latest_step(), args=wanted)
    return TrainState(found.arrays["params"], found.arrays["moments"], Progress(**found.progress))
