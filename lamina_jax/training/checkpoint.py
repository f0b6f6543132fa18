"""A training run on disk: orbax checkpoints of its state. Nothing is pickled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from lamina_jax.training.loop import Progress, TrainState


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
