"""The routes: HTTP in, calls to the service, HTTP out. Knows nothing of engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from msgspec.json import encode
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import lamina_jax
from lamina_jax.server.answer import Answer
from lamina_jax.server.auth import KeyGuard
from lamina_jax.server.call import Call
from lamina_jax.server.chat_answer import ChatAnswer
from lamina_jax.server.completion_answer import CompletionAnswer
from lamina_jax.server.errors import RETRY_AFTER, ApiError, ErrorBody, as_api_error
from lamina_jax.server.prompts import PromptTooLong, TextOrIds, encode_prompt
from lamina_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from lamina_jax.server.request_limits import RequestLimits
from lamina_jax.server.request_log import RequestLog
from lamina_jax.server.service import Service

UNREAD_SECONDS = 5.0
"""What a client gets, after its request's deadline, to read that it is over."""

SCRAPE_SECONDS = 1.0
"""What the engine gets to answer Prometheus; then it is told what was known before."""

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault."},
    "5XX": {"model": ErrorBody, "description": "The server is, or cannot answer now."},
}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Not yet, or not any more, and why."}}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, its chunks."}
}
"""For `/openapi.json`."""

router = APIRouter()


def create_app(service: Service, keys: tuple[bytes, ...] = ()) -> ASGIApp:
    """The web application over a service; `keys`: of which requests show one, none: they need not."""
    app = FastAPI(title="lamina_jax", version=lamina_jax.__version__, responses=ERRORS)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(RequestLimits, seconds=service.request_seconds + UNREAD_SECONDS)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error_response)
    # Around it all, so that every answer carries its request's id, those to its own failures too.
    return RequestLog(KeyGuard(app, keys) if keys else app)


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is alive, whether or not it can serve."""
    return {"status": "ok"}


@router.get("/ready", responses=NOT_READY)
async def ready(request: Request) -> Response:
    """200 while requests are served; else 503 with the phase of the start, or what is lost or silent."""
    service = _service(request)
    if service.phase == "ready":
        return JSONResponse(service.status())
    return JSONResponse(service.status(), 503, headers=RETRY_AFTER)


@router.get("/stats")
async def stats(request: Request) -> Response:
    """What the engine counts."""
    service = _service(request)
    service.require_ready()
    return JSONResponse(await service.stats())


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus: what the server counts, and what the engine said last."""
    service = _service(request)
    if service.facts is not None:
        with suppress(ApiError):
            await service.stats(SCRAPE_SECONDS)
    return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    service = _service(request)
    facts = service.require_ready()
    model = {"id": service.model, "object": "model", "created": service.created, "owned_by": "lamina_jax"}
    return JSONResponse({"object": "list", "data": [model | {"max_model_len": facts["max_model_len"]}]})


@router.post("/v1/completions", responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts, at once or as server-sent events."""
    _require_model(_service(request), body.model)
    return await _generate(request, body, body.prompt, CompletionAnswer, echo=bool(body.echo))


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, at once or as server-sent events."""
    service = _service(request)
    _require_model(service, body.model)
    template = service.tokenizer.chat_template if service.tokenizer is not None else None
    if template is None:
        message = f"the model {service.model!r} has no chat template: use /v1/completions"
        raise ApiError(400, message, param="model", code="no_chat_template")
    prompt = await _in_thread(
        request,
        body,
        template.render,  # a program from whoever made the checkpoint
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    return await _generate(request, body, [prompt], ChatAnswer)


def _require_model(service: Service, name: str) -> None:
    service.require_ready()
    if name != service.model:
        message = f"the model {name!r} does not exist: this server serves {service.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _generate(
    request: Request,
    body: GenerationRequest,
    given: list[TextOrIds],
    kind: type[Answer],
    *,
    echo: bool = False,
) -> Response:
    service = _service(request)
    max_model_len = service.require_ready()["max_model_len"]
    with _at_fault(body):
        sampling = body.sampling(max_model_len)
    tokenise = partial(
        encode_prompt,
        service.tokenizer,
        max_model_len=max_model_len,
        special_tokens=body.special_tokens,
        echo=echo,
    )
    prompts = [await _in_thread(request, body, tokenise, prompt) for prompt in given]
    call = service.open(body.ID_PREFIX, prompts, sampling, request.state.record, param_of=body.param_of)
    with ExitStack() as owned:
        owned.callback(service.close, call)
        answer = kind(call.id, body, prompts)
        await _unless_gone(request, call.accepted())
        if not body.stream:
            whole = encode(await _unless_gone(request, _whole(call, answer)))
            return Response(whole, media_type="application/json")
        owned.pop_all()  # from here on the call is the stream's
    return _EventStream(service, call, answer)


async def _in_thread(
    request: Request, body: GenerationRequest, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What takes its time, within that of the request; what is late runs on, so it must not be long."""
    service = _service(request)
    try:
        async with asyncio.timeout_at(service.deadline(request.state.record)):
            with _at_fault(body):
                return await _unless_gone(request, asyncio.to_thread(function, *args, **kwargs))
    except TimeoutError:
        raise service.late() from None


@contextmanager
def _at_fault(body: GenerationRequest) -> Iterator[None]:
    """An error is that of a field of the body, with whose name it begins."""
    try:
        yield
    except (TypeError, ValueError) as error:
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        raise ApiError(400, str(error), param=body.param_of(str(error)), code=code) from None


async def _whole(call: Call, answer: Answer) -> dict[str, Any]:
    for prompt, news in (await call.whole()).items():
        answer.take(prompt, news)
    return answer.whole()


class _EventStream(StreamingResponse):
    """A call's outputs as server-sent events. However the response ends, the call is closed."""

    def __init__(self, service: Service, call: Call, answer: Answer) -> None:
        super().__init__(_events(call, answer), media_type="text/event-stream")
        self._service, self._call = service, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.close(self._call)


async def _events(call: Call, answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for prompt, news in call.news():
            for chunk in answer.chunks(prompt, news):
                yield _event(chunk)
    except ApiError as error:
        yield _event(error.body)
        return
    if (usage := answer.last_chunk()) is not None:
        yield _event(usage)
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % encode(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled if the client closes its connection first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has closed the connection")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    return request.app.state.service


def _error_response(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    request.state.record.error = answer.code
    return answer.response()
