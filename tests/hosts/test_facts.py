"""What hosts compare before they are one world: settings that count, and the weights themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compute_hosts import MODEL
from safetensors.numpy import save_file

from lamina_jax.config import EngineConfig
from lamina_jax.hosts.facts import difference, facts_of


def folder_of(path: Path, weight: float) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"x": np.full(5, weight, np.float32)}, path / "model.safetensors")
    return path


def facts(folder: Path, **settings: object) -> dict[str, str]:
    return facts_of(EngineConfig(model=str(folder), **settings), MODEL, folder, "0.10")  # type: ignore[arg-type]


def test_the_path_and_a_hosts_own_settings_do_not_count(tmp_path: Path) -> None:
    ours, theirs = folder_of(tmp_path / "a", 1.0), folder_of(tmp_path / "b", 1.0)
    assert difference(facts(ours), facts(theirs, compilation_cache="off", max_waiting=3)) is None


@pytest.mark.parametrize(
    ("weight", "settings", "named"),
    [
        (1.0, {"page_size": 8}, "page_size is 8 there, and"),
        (2.0, {}, "fingerprint of the weights' files is "),
    ],
)
def test_a_difference_is_named(
    tmp_path: Path, weight: float, settings: dict[str, object], named: str
) -> None:
    """Of the weights, too, where their files have one name and one size."""
    ours, theirs = folder_of(tmp_path / "a", 1.0), folder_of(tmp_path / "b", weight)
    found = difference(facts(ours), facts(theirs, **settings))
    assert found is not None
    assert found.startswith(named)
