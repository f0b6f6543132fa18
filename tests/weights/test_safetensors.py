"""Headers and folders: whatever is wrong with a file is told as a CheckpointError that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.safetensors import INDEX, SINGLE, StoredTensor, find_tensors, read_header

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, np.float16)}


def test_names_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    assert find_tensors(tmp_path) == {
        "a": StoredTensor(tmp_path / SINGLE, "F32", (2, 3)),
        "b.weight": StoredTensor(tmp_path / SINGLE, "F16", (4,)),
    }


@pytest.mark.parametrize("keep", [0, 7, 9, 60, -33, -1])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole .*: .*broken off"):
        find_tensors(tmp_path)


def test_a_pointer_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"no whole safetensors file: .*git-lfs\?"):
        read_header(tmp_path / "x")


def test_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    assert find_tensors(tmp_path)["b.weight"].file == tmp_path / "two.safetensors"

    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names two\.safetensors, which is not in"):
        find_tensors(tmp_path)

    save_file({"c": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.weight is in two\.safetensors, but it is not"):
        find_tensors(tmp_path)

    for weight_map in (
        None,
        {},
        [],
        {"a": 3},
        {"a": "../one.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ".."},
    ):
        (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            find_tensors(tmp_path)


def write_shards(folder: Path) -> dict[str, Any]:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b.weight": TENSORS["b.weight"]}, folder / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b.weight": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*found pytorch_model\.bin"):
        find_tensors(tmp_path)


@given(header=st.binary(max_size=60), data=st.binary(max_size=20))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    for raw in (header + data, len(header).to_bytes(8, "little") + header + data):
        path.write_bytes(raw)
        try:
            assert read_header(path) == {}
        except CheckpointError as error:
            assert str(path) in str(error)
