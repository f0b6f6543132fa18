"""API keys: who may use the model. Knows nothing of what is asked.

Only the digests of the keys are kept, so no log, error or traceback can show one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lamina_jax.config import ConfigError
from lamina_jax.server.errors import ApiError

MIN_KEY_LENGTH = 16
"""Shorter keys can be guessed."""

OPEN_PATHS = ("/health", "/ready")
"""What a load balancer asks, which has no key."""

log = logging.getLogger(__name__)


def read_keys(path: str) -> tuple[bytes, ...]:
    """The digests of the keys in a file of one key per line; blank lines and # comments are left out.

    Raises:
        ConfigError: the file cannot be read, holds no key, or one that cannot be used; the text names the
            line, never the key.
    """
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
    return tuple(map(_digest, keys.values()))


class KeyGuard:
    """Lets a request pass that shows one of the keys; answers others with 401.

    Args:
        keys: from `read_keys`.
    """

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS" or self._shows_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server asks for an API key: send one of its keys as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await JSONResponse(error.body, error.status_code, headers=error.headers)(scope, receive, send)

    def _shows_key(self, scope: Scope) -> bool:
        """Takes the same time whichever key is shown, or none."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        shown = _digest(key.strip().encode("latin-1"))
        known = sum([hmac.compare_digest(shown, digest) for digest in self._keys])
        return scheme.lower() == "bearer" and known > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
