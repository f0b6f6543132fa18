"""Lets requests pass that show an API key. Knows nothing of what is asked."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lamina_jax.server.api_keys import digest
from lamina_jax.server.errors import ApiError

OPEN_PATHS = ("/health", "/ready")
"""What a load balancer asks, which has no key."""


class KeyGuard:
    """Answers requests that show none of the keys with 401.

    Args:
        keys: the digests, from `read_keys`.
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
        await error.response()(scope, receive, send)

    def _shows_key(self, scope: Scope) -> bool:
        """Takes the same time whichever key is shown, or none."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        shown = digest(key.strip().encode("latin-1"))
        equal = [hmac.compare_digest(shown, known) for known in self._keys]  # all of them, found or not
        return scheme.lower() == "bearer" and any(equal)
