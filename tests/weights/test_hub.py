"""A hub id is found in a cache laid out as Hugging Face's tools do, or refused with the way to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.hub import find_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def download(hub: Path, hub_id: str = "org/Some-Model.1") -> Path:
    """A model as `hf download` leaves it: files are links to blobs."""
    folder = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    for made in (folder / "refs", folder / "blobs", snapshot):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "blobs" / "aa").write_text(json.dumps({}))
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    return snapshot


def test_a_downloaded_model_is_found(hub: Path) -> None:
    snapshot = download(hub)
    assert find_model("org/Some-Model.1") == snapshot


def test_a_folder_goes_before_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "Some-Model.1").mkdir(parents=True)
    assert find_model("org/Some-Model.1") == Path("org/Some-Model.1")


def refused(name: str) -> str:
    with pytest.raises(CheckpointError) as error:
        find_model(name)
    return str(error.value)


def test_what_is_not_there_is_refused_with_the_command(hub: Path) -> None:
    message = refused("org/other")
    assert str(hub) in message
    assert "`hf download org/other`" in message


def test_a_broken_download_is_refused(hub: Path) -> None:
    (download(hub) / "config.json").unlink()
    assert "is not whole" in refused("org/Some-Model.1")
    assert "`hf download org/Some-Model.1`" in refused("org/Some-Model.1")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "../up/there", "a/b/c"])
def test_what_is_no_hub_id_is_a_folder_that_is_missing(hub: Path, name: str) -> None:
    assert f"there is no model folder {name!r}" in refused(name)
    assert "hf download" not in refused(name)
