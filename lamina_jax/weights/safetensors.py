"""The safetensors format: which tensors a folder holds, and where. Headers only; no weight is read here.

A file is 8 bytes (the header's length N, little endian), N bytes of JSON (`{name: {dtype, shape,
data_offsets}}`), then the data. A folder has one file, or shards named by an index.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina_jax.models.hf_config import CheckpointError, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `start` and `stop` are bytes from the file's beginning."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, from `model.safetensors` or from the shards of its index.

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
    return {tensor: headers[shard][tensor] for tensor, shard in shard_of.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        CheckpointError: the file is missing, truncated, or not in the format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (8 + length > size and length <= MAX_HEADER_BYTES):
                raise CheckpointError(_truncated(path, size, 8 + length if size >= 8 else 8, "its header"))
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is no safetensors file: its first 8 bytes ask for a header of {length} bytes, "
                    f"and {MAX_HEADER_BYTES} is the most there may be"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    entries = _parse(path, header)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, found a {type(entries).__name__}")
    entries.pop("__metadata__", None)
    return entries


def _stored(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, stop)
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: the header's entry of {name!r} is malformed: {entry!r:.200}")
    expected = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if stop < start or (dtype in ITEM_BYTES and stop - start != expected):
        raise CheckpointError(
            f"{path}: {name!r} of dtype {dtype} and shape {shape} needs {expected} bytes, "
            f"its data_offsets [{start}, {stop}] span {stop - start}"
        )
    return StoredTensor(path, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_extent(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    """The tensors must fill the data without a hole or an overlap."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise CheckpointError(f"{path}: {name!r} begins at byte {tensor.start}, expected byte {end}")
        end = tensor.stop
    if end > size:
        raise CheckpointError(_truncated(path, size, end, "its tensors"))
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor: the file is not whole")


def _truncated(path: Path, size: int, expected: int, what: str) -> str:
    return (
        f"{path} is truncated: it has {size} bytes, {what} need {expected}. "
        f"Was the download broken off, or is this a pointer of git-lfs?"
    )


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
