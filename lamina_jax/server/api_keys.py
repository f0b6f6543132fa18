"""The file of API keys: which may stand in it, and what is kept of them.

Only their digests are kept, so no log, error or traceback can show one. Loads no web server's packages: a
wrong file shows before they are imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

from lamina_jax.config import ConfigError

MIN_KEY_LENGTH = 16
"""Shorter keys can be guessed."""

log = logging.getLogger(__name__)


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """The digests of the keys in a file of one key per line; blank lines and # comments are left out.

    No path: no keys.

    Raises:
        ConfigError: the file cannot be read, holds no key, or one that cannot be used; the text names the
            line, never the key.
    """
    if path is None:
        return ()
    try:
        mode, lines = os.stat(path).st_mode, Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file={path!r} cannot be read: {error.strerror or error}") from None
    if mode & stat.S_IROTH:
        log.warning("api_key_file=%r can be read by every user of this machine: chmod o-r it", path)
    keys = {number: line.strip() for number, line in enumerate(lines, start=1)}
    keys = {number: key for number, key in keys.items() if key and not key.startswith(b"#")}
    for number, key in keys.items():
        if not all(33 <= byte <= 126 for byte in key):
            raise ConfigError(
                f"api_key_file={path!r}: line {number} is no key: printable ASCII without blanks"
            )
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"api_key_file={path!r}: the key in line {number} has less than {MIN_KEY_LENGTH} characters: "
                "make one with 'openssl rand -hex 32'"
            )
    if not keys:
        raise ConfigError(
            f"api_key_file={path!r} holds no key: write one into each line, as 'openssl rand -hex 32' prints"
        )
    return tuple(map(digest, keys.values()))


def digest(key: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(key).digest()
