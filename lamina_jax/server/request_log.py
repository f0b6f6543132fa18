"""An id for every HTTP request, which its answer carries, and a line in the log when it has ended.

The line holds no prompt, no text and no key. Knows nothing of the engine: what a call has to tell stands in
its request's record by then.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"

UNLOGGED = ("/health", "/ready", "/metrics")
"""What is asked every few seconds, and tells nothing when all is well."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RequestRecord:
    """What is told of one HTTP request. Seconds are counted from `began`, of `time.monotonic()`.

    Attributes:
        request_id: the client's, or a new one.
        status: of the answer, 0 where there was none.
        call_id: of its completion, if it became one; so are the rest.
        prompt_tokens, completion_tokens: of all prompts and all choices.
        queue_seconds: for which its prompts waited in the engine's queue, the longest of them.
        first_token_seconds: until the first token of any choice.
        finish_reasons: of the choices that have ended.
        error: the code of the error that ended it.
    """

    request_id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    call_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finish_reasons: Counter[str] = field(default_factory=Counter)
    error: str | None = None

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def fields(self) -> dict[str, Any]:
        """For a line of the log; what is not known is left out."""
        known = {
            "request_id": self.request_id,
            "call_id": self.call_id,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_s": self.queue_seconds,
            "first_token_s": self.first_token_seconds,
            "total_s": self.elapsed(),
            "finish_reason": ",".join(sorted(self.finish_reasons)) or None,
            "error": self.error,
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }


class RequestLog:
    """Gives each request a `RequestRecord`, as `request.state.record`, and writes it down at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord(request_id=_request_id(Headers(scope=scope).get(HEADER, "")))
        scope.setdefault("state", {})["record"] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            if scope["path"] not in UNLOGGED:
                # A path is the client's: quoted, it cannot write lines of its own.
                what = scope["method"], quote(scope["path"])[:128], record.status
                log.info("%s %s %d", *what, extra={"fields": record.fields()})


def _request_id(asked: str) -> str:
    """The client's own, if it can stand in a header and a log."""
    return asked if re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", asked) else uuid.uuid4().hex
