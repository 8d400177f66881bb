"""The routes of the server."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version as installed
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from stretto.serve.http.answering import Stream, Whole
from stretto.serve.http.body import BoundedRoute
from stretto.serve.http.errors import ApiError, error_response, invalid
from stretto.serve.http.logprobs import Speller
from stretto.serve.http.metrics import CONTENT_TYPE
from stretto.serve.http.middleware import Around, note_of
from stretto.serve.http.replies import ChatReply, CompletionReply, Reply, ResponsesReply
from stretto.serve.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Generation,
    ResponsesRequest,
    StreamOptions,
    TokenizeRequest,
)
from stretto.serve.http.service import Ask, Service

VERSION = installed("stretto")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_STREAMED: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}
_OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or its events with `stream`.", "content": _STREAMED},
}


def service_of(request: Request) -> Service:
    """The service behind this server."""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(service_of)]
router = APIRouter(route_class=BoundedRoute, responses=_ERRORS)


def create_app(service: Service) -> FastAPI:
    """The application; its engine starts and stops with it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="stretto", version=VERSION, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.page = (files("stretto.serve.http") / "page.html").read_text(encoding="utf-8")
    app.state.created = int(time.time())
    app.include_router(router)
    app.add_middleware(Around, settings=service.settings, clock=service.clock)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid(error.errors()))


# Text.


@router.post("/v1/chat/completions", responses=_OR_STREAM)
async def chat_completions(body: ChatRequest, request: Request, service: Here) -> Response:
    """Answer a conversation."""
    choices = body.n or 1
    _begin(service, body, choices)
    prompt = await service.encode_chat(body.messages)
    ask = await _ask(service, body, [prompt], choices=choices)
    reply = ChatReply(
        name=f"chatcmpl-{secrets.token_hex(12)}",
        model=service.settings.model_name,
        created=int(time.time()),
        prompt_tokens=len(prompt),
        prompts=1,
        choices=choices,
        include_usage=_wants_usage(body.stream_options),
        speller=_speller(service, ask),
    )
    return _answer(request, service, ask, reply, stream=body.stream)


@router.post("/v1/completions", responses=_OR_STREAM)
async def completions(body: CompletionRequest, request: Request, service: Here) -> Response:
    """Continue texts."""
    given, choices = body.prompts(), body.n or 1
    if not given:
        raise ApiError(400, "prompt: there is none in the list", param="prompt", code="invalid_value")
    _begin(service, body, len(given) * choices, field="n" if choices > 1 else body.prompt_field)
    prompts = [await service.encode(p) if isinstance(p, str) else tuple(p) for p in given]
    ask = await _ask(service, body, prompts, choices=choices)
    reply = CompletionReply(
        name=f"cmpl-{secrets.token_hex(12)}",
        model=service.settings.model_name,
        created=int(time.time()),
        prompt_tokens=sum(map(len, prompts)),
        prompts=len(prompts),
        choices=len(prompts) * choices,
        include_usage=_wants_usage(body.stream_options),
        speller=_speller(service, ask),
    )
    return _answer(request, service, ask, reply, stream=body.stream)


@router.post("/v1/responses", responses=_OR_STREAM)
async def responses(body: ResponsesRequest, request: Request, service: Here) -> Response:
    """Answer a conversation, in the form of the Responses API; nothing is stored."""
    _begin(service, body, 1)
    prompt = await service.encode_chat(body.messages(), field=body.prompt_field)
    ask = await _ask(service, body, [prompt], choices=1)
    reply = ResponsesReply(
        name=secrets.token_hex(12),
        model=service.settings.model_name,
        created=int(time.time()),
        prompt_tokens=len(prompt),
        echoed={
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
        },
        speller=_speller(service, ask),
    )
    return _answer(request, service, ask, reply, stream=body.stream)


def _begin(service: Service, body: Generation, sequences: int, field: str = "n") -> None:
    """Refuse at once what will be refused, before any text is tokenised."""
    _check_model(service, body.model)
    service.check_open(sequences, field)


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.settings.model_name:
        message = f"there is no model {name[:100]!a}; this server has {service.settings.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _ask(service: Service, body: Generation, prompts: Sequence[tuple[int, ...]], *, choices: int) -> Ask:
    return Ask(
        prompts=tuple(prompts),
        prompt_field=body.prompt_field,
        limit_field=body.limit_field,
        choices=choices,
        limit=body.limit,
        sampling=body.sampling(),
        stop=body.stops(),
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.alternatives,
        priority=body.priority or 0,
        deadline_s=body.timeout,
        grammar=await service.compiler.grammar(body.wanted()),
    )


def _speller(service: Service, ask: Ask) -> Speller | None:
    return None if ask.logprobs is None else service.speller


def _wants_usage(options: StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def _answer(request: Request, service: Service, ask: Ask, reply: Reply, *, stream: bool | None) -> Response:
    handles = service.submit(ask)
    note_of(request.scope).handles = handles
    return (Stream if stream else Whole)(service, handles, reply)


# Tokens and models.


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: Here) -> dict[str, Any]:
    """The token ids of a text or of a conversation."""
    _check_model(service, body.model)
    if body.messages is not None:
        tokens = await service.encode_chat(body.messages)
    else:
        tokens = await service.encode(body.prompt or "", special=body.add_special_tokens)
    return {"count": len(tokens), "max_model_len": service.longest, "tokens": tokens}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: Here) -> dict[str, Any]:
    """The text of token ids."""
    _check_model(service, body.model)
    return {"prompt": await service.decode(body.tokens)}


@router.get("/v1/models")
async def models(request: Request, service: Here) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model_card(request, service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request, service: Here) -> dict[str, Any]:
    """One model."""
    _check_model(service, name)
    return _model_card(request, service)


def _model_card(request: Request, service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "stretto",
        "root": service.settings.engine.model,
        "parent": None,
        "max_model_len": service.longest,
    }


# The server itself.


@router.get("/health")
async def health(service: Here) -> JSONResponse:
    """200 while the engine is idle or makes progress, else 503 with the reason."""
    problem = "this server is shutting down" if service.draining else service.problem()
    if problem is not None:
        raise ApiError(503, problem, code="unhealthy")
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response)
async def metrics(service: Here) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of the server."""
    return {"version": VERSION}


@router.get("/v1/stretto/live")
async def live(service: Here) -> dict[str, Any]:
    """What the engine does now."""
    return service.view()


@router.get("/", include_in_schema=False)
async def page(request: Request) -> HTMLResponse:
    """The chat and the live view."""
    return HTMLResponse(request.app.state.page, headers=PAGE_HEADERS)
