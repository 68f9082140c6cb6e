"""Trailing slashes, HEAD and OPTIONS for every route, and the answer where no route matches."""

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from grpc import StatusCode
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orthrus.deployments.failures.failure import Failure


class NormalizePaths:
    """Middleware: a trailing slash changes nothing, and HEAD is GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root = scope.get("root_path", "")
        # Not by a redirect, after which some clients would not send the body again.
        path = scope["path"].rstrip("/")
        if path != root:
            scope["path"] = path
            scope["raw_path"] = path.encode()
        else:
            scope["path"] = f"{root}/"
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # In a copy: if the server's own scope said GET, the server would wait for the body and drop the connection.
        await self._app({**scope, "method": "GET"}, receive, send_head)


def no_route(request: HTTPRequest, status: int) -> Failure | Response:
    """The answer to a request that no route takes. If other methods of the path are served, the answer names them."""
    allowed = _methods(request.app, request.scope)
    path = request.url.path
    if not allowed:
        return Failure(404, StatusCode.UNIMPLEMENTED, f"{request.method} {path} is not served here")
    headers = {"Allow": ", ".join(allowed)}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    use = " or ".join(method for method in allowed if method != "HEAD")
    message = f"{request.method} is not served at {path}: use {use}"
    return Failure(status, StatusCode.UNIMPLEMENTED, message, headers=headers)


def _methods(app: FastAPI, scope: Scope) -> list[str]:
    """The methods that a route takes at the path."""
    found = [
        method
        for method in ("DELETE", "GET", "POST")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.routes)
    ]
    return [*found, "HEAD"] if "GET" in found else found
