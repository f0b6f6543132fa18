"""A training run on disk: orbax checkpoints of its state. Nothing is pickled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lamina_jax.training.loop import Progress, TrainState


class Checkpoints:
    """The newest two checkpoints of a run below `folder`; to be used as a context manager."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Writes `state`, unless its step is the newest one written."""
        if state.progress.step != self._manager.latest_step():
            arrays = ocp.args.StandardSave({"params": state.params, "moments": state.moments})
            progress = ocp.args.JsonSave(asdict(state.progress))
            self._manager.save(state.progress.step, args=ocp.args.Composite(arrays=arrays, progress=progress))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, shaped as `like`; None where nothing was written yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, {"params": like.params, "moments": like.moments}
        )
        arrays = ocp.args.StandardRestore(shapes)
        found = self._manager.restore(
            step, args=ocp.args.Composite(arrays=arrays, progress=ocp.args.JsonRestore())
        )
        return TrainState(found.arrays["params"], found.arrays["moments"], Progress(**found.progress))
