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
from lamina_jax.weights.safetensors import INDEX, SINGLE, find_tensors, read_header

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, np.float16)}


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_names_shapes_and_places(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    stored = find_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "a": ("F32", (2, 3)),
        "b.weight": ("F16", (4,)),
    }
    raw = (tmp_path / SINGLE).read_bytes()
    for name, tensor in stored.items():
        assert raw[tensor.start : tensor.stop] == TENSORS[name].tobytes()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, -33, -32, -8, -1])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    size = len(whole[:keep])
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors is truncated: it has {size} bytes.*need \d+"
    ):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 10_000, b"", "not valid JSON"),
        (b"[]", b"", "must be a JSON object, found a list"),
        ({"a": 3}, b"", "entry of 'a' is malformed: 3"),
        ({"a": entry(shape=[-1])}, b"1234", "entry of 'a' is malformed"),
        ({"a": entry(shape=[True])}, b"1234", "entry of 'a' is malformed"),
        ({"a": entry(offsets=[0])}, b"1234", "entry of 'a' is malformed"),
        ({"a": entry(shape=[2])}, b"1234", r"'a' of dtype F32 and shape \[2\] needs 8 bytes, .* span 4"),
        ({"a": entry(offsets=[4, 0])}, b"1234", r"data_offsets \[4, 0\] span -4"),
        ({"a": entry(offsets=[4, 8])}, b"12345678", r"'a' begins at byte \d+, expected byte \d+"),
        ({"a": entry(), "b": entry()}, b"1234", "'b' begins at byte"),
        ({"a": entry()}, b"12345678", "4 bytes follow the last tensor"),
    ],
)
def test_malformed_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "x.safetensors", raw, data))


def test_a_header_beyond_the_formats_bound_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"no safetensors file.*100000000 is the most"):
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


NUMBERS = st.one_of(st.integers(-1, 12), st.just(2**70), st.booleans(), st.none(), st.text(max_size=1))


@given(
    dtype=st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "x"]),
    shape=st.lists(NUMBERS, max_size=3),
    offsets=st.lists(NUMBERS, min_size=1, max_size=3),
    data=st.binary(max_size=12),
)
def test_any_entry_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[Any], offsets: list[Any], data: bytes
) -> None:
    header = json.dumps({"a": entry(dtype, shape, offsets)}).encode()
    path = write(tmp_path_factory.mktemp("fuzz") / "x", header, data)
    try:
        tensor = read_header(path)["a"]
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert 0 < tensor.start <= tensor.stop == path.stat().st_size
