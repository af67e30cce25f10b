"""The original's two servers: /complete, and the pair /model/predict and /model/get_prediction."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from mesh_transformer.config.errors import UserError
from mesh_transformer.engine.request import Request
from mesh_transformer.sample.options import SamplingOptions
from mesh_transformer.serve.asking import check_length, encode, random_seed
from mesh_transformer.serve.bridge import Submission, unless_gone
from mesh_transformer.serve.errors import bad_request
from mesh_transformer.serve.predictions import Predictions
from mesh_transformer.serve.reading import parse_object, read_body
from mesh_transformer.serve.schema import CompleteRequest, GetPredictionRequest, PredictRequest, Strict
from mesh_transformer.serve.served import Served
from mesh_transformer.serve.validation import validate

COMPLETE_TOKENS = 256
Asked = TypeVar("Asked", bound=Strict)


async def complete(http: HttpRequest, served: Served) -> dict[str, Any]:
    """POST /complete: exactly 256 new tokens, whatever they are."""
    asked = await _read(http, served, CompleteRequest)
    request = await asyncio.to_thread(
        _request, served, asked.context, COMPLETE_TOKENS, temperature=asked.temp, top_p=asked.top_p
    )
    submission = Submission(served, [request])
    try:
        return {"completion": await unless_gone(_text(submission), http.receive)}
    finally:
        submission.cancel()


async def predict(http: HttpRequest, served: Served, predictions: Predictions) -> dict[str, Any]:
    """POST /model/predict: begins, and answers with a number at once."""
    asked = await _read(http, served, PredictRequest)
    length = 256 if asked.length is None else asked.length
    check_length(length, served, "length")
    request = await asyncio.to_thread(
        _request,
        served,
        asked.context,
        length,
        temperature=1.0 if asked.temp is None else asked.temp,
        top_p=0.9 if asked.top_p is None else asked.top_p,
        top_k=50 if asked.top_k is None else asked.top_k,
    )
    return {"qid": predictions.start(_predicted(asked.context, Submission(served, [request])))}


async def get_prediction(http: HttpRequest, served: Served, predictions: Predictions) -> dict[str, Any]:
    """POST /model/get_prediction: waits for the prediction of a number."""
    asked = await _read(http, served, GetPredictionRequest)
    return await unless_gone(predictions.get(asked.qid), http.receive)


async def _read(http: HttpRequest, served: Served, kind: type[Asked]) -> Asked:
    return validate(kind, parse_object(await read_body(http, served.options)))


def _request(served: Served, context: str, length: int, **options: Any) -> Request:
    """The newest tokens of the context that fit, under the original's sampler, past any end-of-text.

    Where texts do not slide past the context, room is left for the completion.
    """
    ids = encode(context, served, "context")
    n_ctx = served.model.config.n_ctx
    room = n_ctx if served.model.when_full == "slide" else max(1, n_ctx - length)
    try:
        sampling = SamplingOptions(max_tokens=length, ignore_eos=True, sampler="legacy", seed=random_seed(), **options)
    except UserError as error:
        raise bad_request(str(error)) from error
    return Request(prompt=ids[-min(room, served.max_prompt_tokens) :], options=sampling)


async def _text(submission: Submission) -> str:
    return "".join([output.text async for _, output in submission.outputs()])


async def _predicted(context: str, submission: Submission) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        completion = await _text(submission)
    finally:
        submission.cancel()
    return {"context": context, "completion": completion, "time": time.monotonic() - begun}
