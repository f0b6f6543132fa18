"""Weights from a checkpoint into arrays: everything is checked first, then one tensor at a time is read.

Where an array goes (which devices, which sharding) is the caller's business, told by a callback.
"""

from __future__ import annotations

import logging
import math
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.safetensors import StoredTensor, find_tensors

logger = logging.getLogger(__name__)

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Stored dtypes that a weight can be converted from."""

IGNORED = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$")
"""Tensors that checkpoints hold beside what a model needs: rotary frequencies, a tied output projection."""

CONFIG_KEYS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads or head_dim",
    "kv_heads": "num_key_value_heads or head_dim",
    "head_dim": "head_dim",
}
"""The key of config.json that sizes a logical axis."""

ALIGNMENT = 64
"""Bytes. A CPU device takes an array over from numpy without a copy where it begins at a multiple."""

TRANSPOSED_ROWS = 128
"""Rows that are turned at once: two to three times as fast as a whole large matrix."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A parameter and its tensor in the checkpoint.

    Attributes:
        name: of the tensor in the checkpoint.
        shape, axes: as the model holds it; one logical axis name per dimension.
        dtype: that the model holds it in, "float32" or "bfloat16".
        transpose: the checkpoint's axes come in the reverse order.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    transpose: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape


Place = Callable[[TensorSpec, np.ndarray], jax.Array]
"""Puts a tensor, C-contiguous in the spec's shape and dtype, on its devices. The array is given away."""


def load_model(folder: Path, model: nnx.Module, place: Place, *, progress: bool = True) -> None:
    """Fill the abstract parameters of a model of `lamina_jax.models.build`; see `load_weights`."""
    state = nnx.state(model, nnx.Param)
    parameters = [parameter for _, parameter in nnx.to_flat_state(state)]
    arrays = load_weights(folder, [spec_of(parameter) for parameter in parameters], place, progress=progress)
    for parameter in parameters:
        parameter.set_value(arrays[parameter.get_metadata("name")])
    nnx.update(model, state)


def spec_of(parameter: nnx.Param) -> TensorSpec:
    """What a parameter that `lamina_jax.models.layers.param` declared needs of a checkpoint."""
    return TensorSpec(
        name=parameter.get_metadata("name"),
        shape=parameter.shape,
        axes=parameter.get_metadata("axes"),
        dtype=np.dtype(parameter.dtype).name,
        transpose=parameter.get_metadata("transpose"),
    )


def load_weights(
    folder: Path, specs: Sequence[TensorSpec], place: Place, *, progress: bool = True
) -> dict[str, jax.Array]:
    """Read the tensors of `specs` from a folder's safetensors files, by their names.

    Files are memory-mapped, and at most one tensor is in the host's memory beside what `place` keeps.
    A progress bar goes to stderr where that is a terminal.

    Raises:
        CheckpointError: before anything is read: a file that is missing or malformed, tensors that are
            missing, a shape that does not fit, a dtype that cannot be converted.
    """
    stored = find_tensors(folder)
    check(specs, stored)
    in_file_order = sorted(specs, key=lambda spec: (stored[spec.name].file, stored[spec.name].start))
    total = sum(stored[spec.name].stop - stored[spec.name].start for spec in specs)
    arrays = {}
    with _progress_bar(progress) as bar:
        task = bar.add_task("Loading weights", total=total)
        for spec in in_file_order:
            tensor = stored[spec.name]
            arrays[spec.name] = place(spec, read_tensor(tensor, spec))
            # Transfers are asynchronous: without waiting, every tensor would be in flight at once.
            jax.block_until_ready(arrays[spec.name])
            bar.advance(task, tensor.stop - tensor.start)
    return arrays


def check(specs: Iterable[TensorSpec], stored: dict[str, StoredTensor]) -> None:
    """Refuse what does not fit, before anything is read; warn of tensors that nothing needs."""
    needed = {spec.name: spec for spec in specs}
    missing = [name for name in needed if name not in stored]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    for spec in needed.values():
        tensor = stored[spec.name]
        if tensor.shape != spec.stored_shape:
            raise CheckpointError(_misfit(spec, tensor))
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: {spec.name} is of dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}"
            )
    unused = [name for name in stored if name not in needed and not IGNORED.search(name)]
    if unused:
        logger.warning("the model has no place for %s of the checkpoint", _some(unused))


def read_tensor(tensor: StoredTensor, spec: TensorSpec) -> np.ndarray:
    """A copy of one tensor in the spec's shape and dtype, converted and transposed on the way."""
    stored = _map(tensor)
    out = _aligned_empty(spec.shape, np.dtype(spec.dtype))
    if not spec.transpose:
        np.copyto(out, stored, casting="unsafe")
        return out
    for row in range(0, len(stored), TRANSPOSED_ROWS):
        rows = slice(row, row + TRANSPOSED_ROWS)
        np.copyto(out[..., rows], stored[rows].T, casting="unsafe")
    return out


def _map(tensor: StoredTensor) -> np.ndarray:
    """A tensor in its file's pages, which are let go with the array."""
    first = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with tensor.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), tensor.stop - first, access=mmap.ACCESS_READ, offset=first)
    dtype = DTYPES[tensor.dtype]
    return np.frombuffer(pages, dtype, math.prod(tensor.shape), tensor.start - first).reshape(tensor.shape)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _misfit(spec: TensorSpec, tensor: StoredTensor) -> str:
    message = (
        f"{tensor.file}: {spec.name} has the shape {list(tensor.shape)}, expected {list(spec.stored_shape)}"
    )
    axes = spec.axes[::-1] if spec.transpose else spec.axes
    if len(tensor.shape) != len(axes):
        return message
    pairs = zip(axes, tensor.shape, spec.stored_shape, strict=True)
    keys = [CONFIG_KEYS[axis] for axis, found, expected in pairs if found != expected]
    return f"{message}: check {' and '.join(keys)} in config.json"


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} tensors: {', '.join(names[:shown])}{more}"


def _progress_bar(wanted: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not (wanted and sys.stderr.isatty()),
    )
