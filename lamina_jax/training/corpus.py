"""The text that every machine has: the sources of Python's own standard library.

Docstrings and comments give English, the rest gives code. Nothing is downloaded. This module knows
nothing of tokens or models.
"""

from __future__ import annotations

import sysconfig
from contextlib import suppress
from pathlib import Path

# Tests repeat themselves, encodings are tables of numbers, site-packages differ from machine to machine.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"})


def read_corpus() -> list[str]:
    """The text of every `*.py` file of the standard library, sorted by path; those that are not UTF-8 are
    left out, and `SKIPPED_FOLDERS`.

    Raises:
        FileNotFoundError: there is no such file, as in an installation that ships byte code only.
    """
    root, texts = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            with suppress(UnicodeDecodeError):
                texts.append(path.read_text(encoding="utf-8"))
    if not texts:
        raise FileNotFoundError(f"no Python sources below {root}: train on a machine that has them")
    return [text for text in texts if text.strip()]
