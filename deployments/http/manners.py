"""What every HTTP route has in common: how it answers to other methods, other spellings of its path, and other sites' pages."""

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from grpc import StatusCode
from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.failures.failures import Failure

# What a page may read of an answer besides its body.
_EXPOSED = (
    "x-request-id",
    "retry-after",
    "x-orthrus-ignored-fields",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


class PathManners:
    """A trailing slash changes nothing, and HEAD is GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root = scope.get("root_path", "")
        # A redirect would lose the body of some clients.
        path = scope["path"].rstrip("/")
        if path != root:
            scope["path"] = path
            scope["raw_path"] = path.encode()
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # A copy: in the server's own scope it stays HEAD, or the server would wait for the body and drop the connection.
        await self._app({**scope, "method": "GET"}, receive, send_head)


class Cors:
    """Lets web pages of `ApiConfig.cors_origins` call the API; which they are is known once the ingress has been made."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._chosen: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # The app's start, before which there is no ingress to ask.
            await self._app(scope, receive, send)
            return
        if self._chosen is None:
            self._chosen = with_cors(self._app, serve.get_replica_context().servable_object.cors_origins)
        await self._chosen(scope, receive, send)


def with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    """`app`, whose answers tell browsers that pages of `origins` may have them. Preflights need no key: they can't have one."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )


def no_route(request: HTTPRequest, status: int) -> Failure | Response:
    """The answer to a request that no route takes: which method its path has, if it has any."""
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
    """The methods that some route takes at the path."""
    found = [
        method
        for method in ("DELETE", "GET", "POST")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.routes)
    ]
    return [*found, "HEAD"] if "GET" in found else found
