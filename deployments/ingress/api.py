"""The HTTP API of an application: all routers, and what every request goes through before and after them."""

from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from orthrus.deployments.access.call import Call
from orthrus.deployments.failures.errors import EXPECTED
from orthrus.deployments.failures.failure import Failure, describe_failure
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.http.call_middleware import CallMiddleware
from orthrus.deployments.http.cors import with_cors
from orthrus.deployments.http.paths import NormalizePaths, no_route
from orthrus.deployments.ingress import docs
from orthrus.deployments.messages import router as messages
from orthrus.deployments.messages.format import error_body, error_status, is_messages_path
from orthrus.deployments.openai import router as openai
from orthrus.deployments.operations import router as operations
from orthrus.deployments.operations.status import ModelStatus
from orthrus.deployments.page import router as page
from orthrus.deployments.page.feed import ClusterFeed
from orthrus.deployments.responses import router as responses
from orthrus.deployments.responses.api import ResponsesApi
from orthrus.deployments.tokenizer import router as tokenizer

ROUTERS = (openai.router, responses.router, messages.router, tokenizer.router, operations.router, docs.router)


def create_api(
    handler: Handler, responses: ResponsesApi, status: ModelStatus, feed: ClusterFeed | None
) -> FastAPI:
    """The API in front of a model. Endpoints find the arguments in the application's state (`deployments.http.depends`).

    feed: the data of the page's cluster view. None: do not serve the page.
    """
    # Traces are Serve's and ours (deployments/access/call.py).
    api = FastAPI(title="Orthrus", openapi_url=None, redirect_slashes=False, telemetry={"tracing": False})
    api.state.handler, api.state.responses, api.state.status = handler, responses, status
    for router in ROUTERS:
        api.include_router(router)
    if feed is not None:
        api.state.feed = feed
        api.include_router(page.router)
    # A request goes through the last one first.
    api.add_middleware(CallMiddleware)
    api.add_middleware(with_cors, handler.config.cors_origins)
    api.add_middleware(NormalizePaths)
    for kind in (*EXPECTED, Exception):
        api.add_exception_handler(kind, _answer_failure)
    for status_code in (404, 405):
        api.add_exception_handler(status_code, _answer_no_route)
    return api


async def _answer_failure(request: HTTPRequest, error: Exception) -> Response:
    call: Call | None = getattr(request.state, "call", None)
    if call is not None:
        call.outcome = type(error).__name__
    return _failure_response(request, describe_failure(error, call.sent_as if call is not None else None))


def _failure_response(request: HTTPRequest, failure: Failure) -> Response:
    """The failure in the form of the API that was called."""
    if is_messages_path(request.url.path):
        return JSONResponse(error_body(failure), error_status(failure), failure.headers)
    return JSONResponse(failure.body, failure.status, failure.headers)


async def _answer_no_route(request: HTTPRequest, error: Any) -> Response:
    answer = no_route(request, error.status_code)
    return answer if isinstance(answer, Response) else _failure_response(request, answer)
