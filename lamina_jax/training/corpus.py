"""The text that every machine has: the sources of Python's own standard library.

Docstrings and comments give English, the rest gives code. Nothing is downloaded. This module knows
nothing of tokens or models.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Tests repeat themselves, encodings are tables of numbers, site-packages differ from machine to machine.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"})


def source_files(root: Path | None = None) -> list[Path]:
    """The `*.py` files below `root` (the standard library), sorted, without `SKIPPED_FOLDERS`.

    Raises:
        FileNotFoundError: there is no such file, as in an installation that ships byte code only.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [
        path for path in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]
    if not files:
        raise FileNotFoundError(f"no Python sources below {root}: train on a machine that has them")
    return files


def read_corpus(root: Path | None = None) -> list[str]:
    """The text of every source file, UTF-8; a file in another encoding is left out."""
    texts = []
    for path in source_files(root):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text.strip()]
