"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import reprlib
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

RETRY_AFTER = {"retry-after": "2"}
"""The header of an answer that may be another one soon."""


class Error(BaseModel):
    """What went wrong, of what type, in which field, and a code for programs."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Error


class ApiError(HTTPException):
    """An answer with an error. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, printable(message), headers)
        self.param, self.code = param and printable(param), code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error that ends a request: one of ours, a route that is not there, a body that does not fit."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors()[0])
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def _invalid(found: dict[str, Any]) -> ApiError:
    """From what pydantic found first."""
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']} at character {found['loc'][-1]}")
    places = *found["loc"][1:], found.get("ctx", {}).get("param")
    named = [str(place) for place in places if place not in (None, "[key]")]  # pydantic's mark for a key
    if not named:
        return ApiError(400, "the body must be a JSON object, sent with 'content-type: application/json'")
    param = ".".join(named)
    match found["type"]:
        case "missing":
            message = f"the field {param!r} is missing"
        case "not_supported":
            message = found["msg"]
        case _:
            message = f"{param}: {found['msg']}, got {reprlib.repr(found['input'])}"
    return ApiError(400, message, param=param)


def printable(text: str) -> str:
    """What a client has written may hold half of a surrogate pair, which cannot be sent back as it is."""
    return text.encode(errors="backslashreplace").decode()
