"""The application: paths and their handlers, and what every request passes through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import mesh_transformer
from mesh_transformer.config.errors import UserError
from mesh_transformer.serve import chat, chat_schema, completions, legacy, schema
from mesh_transformer.serve.asking import model_not_found
from mesh_transformer.serve.errors import ApiError, ClientGone, bad_request
from mesh_transformer.serve.guards import ApiKey, Cors, Observe, WriteTimeout
from mesh_transformer.serve.openapi import describe, documented
from mesh_transformer.serve.page import page_responses, unchanged
from mesh_transformer.serve.predictions import Predictions
from mesh_transformer.serve.served import Served


def make_app(served: Served) -> ASGIApp:
    """The server's ASGI application."""
    api = FastAPI(
        title="mesh-transformer",
        version=mesh_transformer.__version__,
        # The documentation pages load scripts from elsewhere; docs/serving.md is the reference.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_openai(api, served)
    _add_originals(api, served)
    _add_operations(api, served)
    _add_page(api)
    _add_errors(api, served)
    describe(api, key=served.options.api_key is not None)
    endpoints = [path for route in api.routes if "{" not in (path := getattr(route, "path", "{"))]
    guarded: ASGIApp = ApiKey(api, served)
    guarded = WriteTimeout(Cors(guarded, served), served)
    return Observe(guarded, served, endpoints)


def _add_openai(api: FastAPI, served: Served) -> None:
    @api.post("/v1/completions", **documented(schema.CompletionRequest, schema.Completion, stream=True))
    async def create_completion(request: Request) -> Response:
        """Completions of one or several prompts, whole or as a stream."""
        _check_json(request)
        return await completions.complete(request, served)

    chats = documented(chat_schema.ChatRequest, chat_schema.ChatCompletion, stream=True)

    @api.post("/v1/chat/completions", **chats)
    async def create_chat_completion(request: Request) -> Response:
        """Answers to messages, whole or as a stream, where the model came with a chat template."""
        _check_json(request)
        return await chat.chat(request, served)

    card = {
        "id": served.options.name,
        "object": "model",
        "created": served.created,
        "owned_by": "mesh-transformer",
        "max_model_len": served.model.config.n_ctx,
    }

    @api.get("/v1/models", **documented(None, schema.ModelList))
    async def list_models() -> Response:
        """The served model."""
        return JSONResponse({"object": "list", "data": [card]})

    # A model's name may hold slashes.
    @api.get("/v1/models/{model:path}", **documented(None, schema.ModelCard, 404, path="model"))
    async def retrieve_model(request: Request) -> Response:
        """The served model, by its name."""
        model = request.path_params["model"]
        if model != served.options.name:
            raise model_not_found(model, served)
        return JSONResponse(card)


def _check_json(request: Request) -> None:
    # A browser lets any page send other types anywhere without asking; this one it asks for first.
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {given!r}; expected application/json", code="unsupported_media_type")


def _add_originals(api: FastAPI, served: Served) -> None:
    predictions = Predictions(served.options)

    @api.post("/complete", **documented(schema.CompleteRequest, schema.CompleteAnswer))
    async def complete(request: Request) -> Response:
        """256 tokens; the protocol of the original's simple server."""
        return JSONResponse(await legacy.complete(request, served))

    @api.post("/model/predict", **documented(schema.PredictRequest, schema.PredictAnswer))
    async def predict(request: Request) -> Response:
        """Begins a prediction; the protocol of the original's container."""
        return JSONResponse(await legacy.predict(request, served, predictions))

    @api.post("/model/get_prediction", **documented(schema.GetPredictionRequest, schema.Prediction, 404))
    async def get_prediction(request: Request) -> Response:
        """Waits for a prediction."""
        return JSONResponse(await legacy.get_prediction(request, served, predictions))


def _add_operations(api: FastAPI, served: Served) -> None:
    async def health() -> Response:
        """Whether requests are served: 200 or 503."""
        if served.stopping:
            return JSONResponse({"status": "shutting down"}, 503)
        if not served.service.ready:
            return JSONResponse({"status": "warming up"}, 503)
        return JSONResponse({"status": "ok"})

    unready: dict[int | str, Any] = {503: {"model": schema.Health, "description": "Not now."}}
    api.get("/health", response_model=None, responses={200: {"model": schema.Health}, **unready})(health)
    api.head("/health", include_in_schema=False)(health)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Figures."}

    @api.get("/metrics", response_class=Response, responses={200: text})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(served.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_page(api: FastAPI) -> None:
    def handler(response: Response) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return unchanged(response, request.headers)

        return answer

    for path, response in page_responses().items():
        api.add_api_route(path, handler(response), methods=["GET", "HEAD"], include_in_schema=False)


def _add_errors(api: FastAPI, served: Served) -> None:
    @api.exception_handler(ApiError)
    async def expected(request: Request, error: ApiError) -> Response:
        return error.response()

    @api.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return bad_request(str(error)).response()

    @api.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        served.metrics.gone.inc()
        return Response(status_code=499)  # nobody hears it

    @api.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        path, headers = request.url.path, error.headers
        if error.status_code == 405:
            allowed = (headers or {}).get("Allow", "another method")
            message = f"{request.method} {path} is not offered; expected {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=headers).response()
        message = f"there is nothing at {path}; the endpoints are listed at /openapi.json"
        return ApiError(error.status_code, message, code="not_found", headers=headers).response()

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # It is raised again after this answer, and so reaches the server's log with its traceback.
        message = f"the server failed on this request ({type(error).__name__}); its log says why"
        return ApiError(500, message, kind="server_error", code="internal_error").response()
