"""A model's name to its folder: bundled, a path, or where Hugging Face's tools keep a download. No jax here.

Nothing is fetched.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from lamina_jax.config import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    # Only now: it takes a while, and few models have such a name.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise _not_there(hub_id, f"nor a download of it in {constants.HF_HUB_CACHE}") from None
    if not (folder / "config.json").is_file():
        raise _not_there(hub_id, f"and its download in {folder} is not whole")
    return folder


def _not_there(hub_id: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"there is no model folder {hub_id!r}, {where}: give a folder, or download it with "
        f"`hf download {hub_id}`"
    )
