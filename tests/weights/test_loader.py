"""Loading: values as stored, converted and turned round; everything is checked before anything is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lamina_jax.models import ModelConfig, Storage, build
from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.loader import Read, TensorSpec, load_model, load_weights, spec_of
from lamina_jax.weights.reader import ALIGNMENT

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=40,
    hidden_size=12,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
)


def place(spec: TensorSpec, read: Read) -> jax.Array:
    """Checks what a placement may rely on."""
    array = read((slice(None),) * len(spec.shape))
    assert array.shape == spec.shape
    assert array.dtype.name == spec.dtype
    assert array.flags.c_contiguous
    assert array.ctypes.data % ALIGNMENT == 0
    return jnp.asarray(array)


def never(spec: TensorSpec, read: Read) -> jax.Array:
    raise AssertionError(f"{spec.name} was loaded before everything had been checked")


def specs_of(storage: Storage) -> list[TensorSpec]:
    state = nnx.state(build(CONFIG, storage), nnx.Param)
    return [spec_of(parameter) for _, parameter in nnx.to_flat_state(state)]


SPECS = specs_of(Storage(jnp.dtype(jnp.float32)))


def checkpoint(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {spec.name: rng.normal(size=spec.stored_shape).astype(dtype) for spec in SPECS}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_every_parameter_of_a_model_gets_its_tensor(
    tmp_path: Path, stored: str, held: str, layout: str
) -> None:
    tensors = checkpoint(stored)
    save_file(tensors, tmp_path / "model.safetensors")
    model = build(CONFIG, Storage(jnp.dtype(held), layout))
    load_model(tmp_path, model, place)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        expected = tensors[parameter.get_metadata("name")].astype(held)
        found = np.asarray(parameter[...])
        assert found.dtype == np.dtype(held)
        matrix = expected.ndim == 2 and "embed_tokens" not in parameter.get_metadata("name")
        np.testing.assert_array_equal(found, expected.T if layout == "in_out" and matrix else expected)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 300), columns=st.integers(1, 40), start=st.integers(0, 70), transpose=st.booleans()
)
def test_any_shape_at_any_place_in_a_file(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, start: int, transpose: bool
) -> None:
    folder = tmp_path_factory.mktemp("model")
    values = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    save_file({"before": np.zeros(start, np.uint8), "x": values}, folder / "model.safetensors")
    shape = (columns, rows) if transpose else (rows, columns)
    spec = TensorSpec(name="x", shape=shape, axes=("a", "b"), dtype="float32", transpose=transpose)
    found = load_weights(folder, [spec], place)["x"]
    np.testing.assert_array_equal(found, values.T if transpose else values)


def test_shards_give_the_same_as_one_file(tmp_path: Path) -> None:
    tensors = checkpoint()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, array in load_weights(tmp_path, SPECS, place).items():
        np.testing.assert_array_equal(array, tensors[name])


def test_what_was_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first rows of each tensor, here: in bytes of the file, whatever the model holds them in."""
    tensors = checkpoint("float16")
    save_file(tensors, tmp_path / "model.safetensors")

    def place_first_row(spec: TensorSpec, read: Read) -> jax.Array:
        return jnp.asarray(read((slice(0, 1), *[slice(None)] * (len(spec.shape) - 1))))

    with caplog.at_level(logging.INFO):
        load_weights(tmp_path, SPECS, place_first_row)
    rows, total = (
        sum(tensor[:1].nbytes for tensor in tensors.values()),
        sum(tensor.nbytes for tensor in tensors.values()),
    )
    assert f"read {rows} of {total} bytes of weights" in caplog.text


def test_an_array_does_not_change_when_the_next_is_read(tmp_path: Path) -> None:
    """`place` may keep the memory it is given, as a CPU device does."""
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    given_away: dict[str, np.ndarray] = {}

    def keep(spec: TensorSpec, read: Read) -> jax.Array:
        given_away[spec.name] = read((slice(None),) * len(spec.shape))
        return jnp.zeros(())

    load_weights(tmp_path, SPECS, keep)
    assert given_away.keys() == tensors.keys()
    for name, array in given_away.items():
        np.testing.assert_array_equal(array, tensors[name])


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    tensors = checkpoint()
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    gone = len(tensors) - len(kept)
    with pytest.raises(CheckpointError, match=rf"lacks {gone} tensors: .*layers\.1.* and {gone - 5} more"):
        load_weights(tmp_path, SPECS, never)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.embed_tokens.weight", (41, 12), r"\[41, 12\], expected \[40, 12\]: check vocab_size in"),
        (
            "model.layers.1.mlp.up_proj.weight",
            (12, 20),
            "check intermediate_size and hidden_size in config.json",
        ),
        ("model.layers.0.self_attn.k_proj.weight", (24, 12), "check num_key_value_heads or head_dim in"),
        ("model.norm.weight", (12, 1), r"\[12, 1\], expected \[12\]"),
    ],
)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_a_shape_that_does_not_fit_names_the_key_at_fault(
    tmp_path: Path, layout: str, name: str, shape: tuple[int, ...], message: str
) -> None:
    save_file(checkpoint() | {name: np.zeros(shape, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} has the shape .*{message}"):
        load_weights(tmp_path, specs_of(Storage(jnp.dtype(jnp.float32), layout)), never)


def test_a_dtype_that_cannot_be_converted(tmp_path: Path) -> None:
    tensors = checkpoint() | {"model.norm.weight": np.zeros(12, np.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight is of dtype I8, expected one of F32, F16, BF16"
    ):
        load_weights(tmp_path, SPECS, never)


def test_tensors_without_a_place_are_warned_about_once_unless_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}
    save_file(checkpoint() | known, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_weights(tmp_path, SPECS, place)
    assert not caplog.records
    strange = {f"extra.{i}": np.zeros(1, np.float32) for i in range(7)}
    save_file(checkpoint() | strange, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_weights(tmp_path, SPECS, place)
    (record,) = caplog.records
    assert "no place for 7 tensors: extra.0" in record.getMessage()
    assert "2 more" in record.getMessage()


def test_one_tensor_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(checkpoint(), tmp_path / "model.safetensors")
    events: list[str] = []

    def record(spec: TensorSpec, read: Read) -> jax.Array:
        events.append("place")
        return jnp.zeros(())

    wait = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda array: (events.append("wait"), wait(array))[1])
    load_weights(tmp_path, SPECS, record)
    assert events == ["place", "wait"] * len(SPECS)


def test_bfloat16_bits_survive(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256).view(ml_dtypes.bfloat16)
    save_file({"x": bits}, tmp_path / "model.safetensors")
    spec = TensorSpec(name="x", shape=(256, 256), axes=("a", "b"), dtype="bfloat16")
    found = np.asarray(load_weights(tmp_path, [spec], place)["x"])
    np.testing.assert_array_equal(found.view(np.uint16), bits.view(np.uint16))
