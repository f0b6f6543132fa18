"""Bounds what a client may cost: the bytes of one body and of all together, and the time until it has gone.

Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lamina_jax.server.errors import RETRY_AFTER, ApiError

MAX_BODY_BYTES = 10 * 2**20

MAX_BYTES = 256 * 2**20
"""Of the bodies of all requests that are not over: what is made of a body is several times as large."""

BODY_SECONDS = 60.0
"""In which a body must have come."""


class RequestLimits:
    """Refuses a body before it is in memory, and leaves a client that is not gone in time.

    Args:
        seconds: for all of a request, until the client has read its answer.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds, self._held = app, seconds, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body_due = asyncio.get_running_loop().time() + BODY_SECONDS
        received, more = 0, True

        async def limited() -> Message:
            nonlocal received, more
            if not more:  # its end is waited for
                return await receive()
            try:
                async with asyncio.timeout_at(body_due):
                    message = await receive()
            except TimeoutError:
                late = f"the body has not come within {BODY_SECONDS:g} s"
                raise ApiError(408, late, code="timeout", headers={"connection": "close"}) from None
            more, size = message.get("more_body", False), len(message.get("body", b""))
            received += size
            self._held += size
            if received > MAX_BODY_BYTES:
                raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
            if self._held > MAX_BYTES:
                much = f"the bodies of all requests are larger than {MAX_BYTES} bytes: send it again later"
                raise ApiError(503, much, code="overloaded", headers=RETRY_AFTER)
            return message

        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                await self._app(scope, limited, send)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            self._held -= received
