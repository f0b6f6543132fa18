"""Where compiled programs are kept from one start to the next: a folder of JAX's persistent cache.

It owns which folder, and that programs of every size are kept. What a program is compiled from decides
whether it is found again: JAX sees to that, and to entries that cannot be read, which it compiles anew.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

log = logging.getLogger(__name__)

OFF = "off"


def keep_programs(folder: str | None) -> None:
    """Have this process keep what it compiles, and find what others have kept.

    A folder that cannot be written to is warned of, and programs are compiled at every start.

    Args:
        folder: it is made if need be, for this user alone: whoever writes to it decides what this process
            runs. None takes the one that JAX has been given ($JAX_COMPILATION_CACHE_DIR), else
            `default_folder()`, unless JAX has been told to keep nothing. "off" keeps nothing.
    """
    if folder == OFF or (folder is None and not _setting("jax_enable_compilation_cache")):
        _set(jax_enable_compilation_cache=False)
        return
    path = Path(folder or _setting("jax_compilation_cache_dir") or default_folder()).expanduser()
    if not _can_write(path):
        _set(jax_enable_compilation_cache=False)
        return
    _set(
        jax_enable_compilation_cache=True,
        jax_compilation_cache_dir=str(path),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def default_folder() -> Path:
    """lamina_jax/xla in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lamina_jax" / "xla"


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        log.warning(
            "compiled programs cannot be kept in %s (%s): every start compiles them anew; "
            "--compilation-cache names another folder",
            folder,
            error.strerror,
        )
        return False


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _set(**settings: bool | str | float) -> None:
    if all(_setting(name) == value for name, value in settings.items()):
        return
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at them once, at the first program
