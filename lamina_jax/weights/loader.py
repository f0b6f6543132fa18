"""Weights from a checkpoint into arrays: everything is checked first, then one tensor at a time is read.

Where an array goes (which devices, which sharding), and so which parts of its tensor are read, is the
caller's business, told by a callback.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.reader import Reader
from lamina_jax.weights.safetensors import StoredTensor, find_tensors, opened

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


Read = Callable[[Any], np.ndarray]
"""`read(index)`: a part of a tensor in the spec's shape and dtype; see `lamina_jax.weights.reader.Reader`."""

Place = Callable[[TensorSpec, Read], jax.Array]
"""Puts a tensor on its devices, and reads of it what this process has to."""


def place_whole(spec: TensorSpec, read: Read) -> jax.Array:
    """All of a tensor on the default device."""
    return jnp.asarray(read((slice(None),) * len(spec.shape)))


def load_model(folder: Path, model: nnx.Module, place: Place = place_whole) -> None:
    """Fill the abstract parameters of a model of `lamina_jax.models.build`; see `load_weights`."""
    state = nnx.state(model, nnx.Param)
    parameters = [parameter for _, parameter in nnx.to_flat_state(state)]
    arrays = load_weights(folder, [spec_of(parameter) for parameter in parameters], place)
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


def load_weights(folder: Path, specs: Sequence[TensorSpec], place: Place) -> dict[str, jax.Array]:
    """Read the tensors of `specs` from a folder's safetensors files, by their names.

    Of each what `place` asks for is read, and at most one tensor's parts, and a few rows, are in the host's
    memory beside what it keeps. The log says how many bytes were read.
    A progress bar goes to stderr where that is a terminal.

    Raises:
        CheckpointError: before anything is read: a file that is missing or malformed, tensors that are
            missing, a shape that does not fit, a dtype that cannot be converted.
    """
    stored = find_tensors(folder)
    _check(specs, stored)
    spec_by_name = {spec.name: spec for spec in specs}
    needed = {name: tensor for name, tensor in stored.items() if name in spec_by_name}
    total, taken = sum(map(num_bytes, needed.values())), 0
    arrays = {}
    with _progress_bar() as bar:
        task = bar.add_task("Loading weights", total=total)
        for name, tensor in needed.items():
            spec = spec_by_name[name]
            with opened(tensor.file) as file:
                read = Reader(
                    file.get_slice(name), spec.shape, np.dtype(spec.dtype), transpose=spec.transpose
                )
                arrays[name] = place(spec, read)
            # Transfers are asynchronous: without waiting, every tensor would be in flight at once.
            jax.block_until_ready(arrays[name])
            taken += read.elements * DTYPES[tensor.dtype].itemsize
            bar.advance(task, num_bytes(tensor))
    logger.info("read %d of %d bytes of weights", taken, total)
    return arrays


def _check(specs: Iterable[TensorSpec], stored: dict[str, StoredTensor]) -> None:
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


def num_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor, of a dtype of `DTYPES`, in its file."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


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


def _progress_bar() -> Progress:
    return Progress(
        *Progress.get_default_columns(),
        DownloadColumn(binary_units=True),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
