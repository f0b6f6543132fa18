"""Which tensors a folder's safetensors files hold. The format is the library's business; no weight is read.

A folder has one file, or shards named by an index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lamina_jax.models.hf_config import CheckpointError, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `dtype` as the format names it ("F32", "BF16", ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, from `model.safetensors` or from the shards of its index, in file order.

    Raises:
        CheckpointError: no weights, a shard that is missing, a file that is truncated or malformed, a
            tensor that its shard does not have.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise CheckpointError(_no_weights(folder))
    shard_of = _weight_map(folder / INDEX)
    headers = {name: read_header(folder / name) for name in sorted(set(shard_of.values()))}
    for tensor, shard in shard_of.items():
        if tensor not in headers[shard]:
            raise CheckpointError(f"{INDEX} says that {tensor} is in {shard}, but it is not")
    named = [(name, tensor) for header in headers.values() for name, tensor in header.items()]
    return {name: tensor for name, tensor in named if shard_of.get(name) == tensor.file.name}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name, in the order in which they lie there.

    Raises:
        CheckpointError: the file is missing, truncated, or not in the format.
    """
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {
        name: StoredTensor(path, stored.get_dtype(), tuple(stored.get_shape()))
        for name, stored in slices.items()
    }


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file as the library's `safe_open` reads it, into numpy arrays.

    Raises:
        CheckpointError: the file is missing, truncated, or not in the format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file: {error}. "
            f"Was the download broken off, or is this a pointer of git-lfs?"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map = {weight_map!r:.200}, expected an object of tensor: file")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: {tensor} lies in {shard!r}, expected a *.safetensors beside the index"
            )
        if not (path.parent / shard).exists():
            raise CheckpointError(f"{path} names {shard}, which is not in {path.parent}")
    return weight_map


def _no_weights(folder: Path) -> str:
    others = sorted(
        file.name
        for file in folder.glob("*")
        if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
    )
    found = f"; found {', '.join(others[:5])}, which is not read" if others else ""
    return f"{folder} has neither {SINGLE} nor {INDEX}{found}"
