"""Which web pages browsers let call the API."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

# The headers of an answer that a page may read.
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


def with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    """Middleware: `app`, whose answers tell browsers that pages of `origins` may read them.

    A preflight request needs no key, since browsers send none with it.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )
