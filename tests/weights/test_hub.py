"""A hub id is found in a cache laid out as Hugging Face's tools do, or refused with the way to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.hub import cache_folder, find_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def download(hub: Path, hub_id: str = "org/Some-Model.1", revision: str = REVISION) -> Path:
    """A model as `hf download` leaves it: files are links to blobs."""
    folder = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for made in (folder / "refs", folder / "blobs", snapshot):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
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


@pytest.mark.parametrize("damage", ["config.json", "revision", "escape"])
def test_a_broken_download_is_refused(hub: Path, damage: str) -> None:
    snapshot = download(hub)
    if damage == "config.json":
        (snapshot / "config.json").unlink()
    else:
        other = {"revision": REVISION[::-1], "escape": "../snapshots/" + REVISION}[damage]
        (snapshot.parent.parent / "refs" / "main").write_text(other)
    assert "is not whole" in refused("org/Some-Model.1")
    assert "`hf download org/Some-Model.1`" in refused("org/Some-Model.1")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "../up/there", "a/b/c"])
def test_what_is_no_hub_id_is_a_folder_that_is_missing(hub: Path, name: str) -> None:
    assert f"there is no model folder {name!r}" in refused(name)
    assert "hf download" not in refused(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a/b", "HF_HOME": "/c"}, "/a/b"),
        ({"HF_HOME": "/c", "XDG_CACHE_HOME": "/x"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "HF_HUB_CACHE": "~/hub"}, "/h/hub"),
    ],
)
def test_the_cache_is_where_hugging_face_has_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)
