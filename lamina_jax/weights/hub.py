"""A model's name to its folder: bundled, a path, or where Hugging Face's tools keep a download. No jax here.

Nothing is fetched. Their cache is `models--org--name/` with `refs/main`, which holds a revision, and
`snapshots/<revision>/`, which is an ordinary model folder.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from lamina_jax.config import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"[0-9a-f]{40}")


def find_model(name: str) -> Path:
    """The folder of a model: "bundled", a path, or a hub id ("org/name") that has been downloaded.

    Raises:
        CheckpointError: there is no such folder.
    """
    if name == "bundled":
        return Path(str(resources.files("lamina_jax") / "data" / "bundled"))
    folder = Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        return find_snapshot(name)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {name!r}: give a Hugging Face folder, or 'bundled'")
    return folder


def find_snapshot(hub_id: str) -> Path:
    """The cached folder of the main revision of "org/name".

    Raises:
        CheckpointError: it is not in the cache, or not whole; says how to download it.
    """
    cached = cache_folder() / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (cached / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise _not_there(hub_id, f"nor a download of it in {cache_folder()}") from None
    snapshot = cached / "snapshots" / revision
    if not REVISION.fullmatch(revision) or not (snapshot / "config.json").is_file():
        raise _not_there(hub_id, f"and its download in {cached} is not whole")
    return snapshot


def cache_folder() -> Path:
    """Where Hugging Face's tools keep downloads, by the environment variables that they obey."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")).expanduser()


def _not_there(hub_id: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"there is no model folder {hub_id!r}, {where}: give a folder, or download it with "
        f"`hf download {hub_id}`"
    )
