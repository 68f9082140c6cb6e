"""The page: a playground, a race against AR decoding, and the cluster. Its scripts call the public API and two routes here."""

from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from orthrus.deployments.http.depends import HandlerDep, Identified
from orthrus.deployments.http.events import event_stream
from orthrus.deployments.page.feed import ClusterFeed
from orthrus.deployments.page.files import PageFile, read_files

INDEX = "index.html"
HEADERS = {
    # Nothing from another host, no script or style in the HTML, no frame around the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Browsers ask each time, and get 304 if nothing changed: so after an update, old and new modules never mix.
    "Cache-Control": "no-cache",
}

router = APIRouter()


async def _feed(request: Request) -> ClusterFeed:
    feed: ClusterFeed = request.app.state.feed
    return feed


@router.get("/page/model", dependencies=[Identified], include_in_schema=False)
async def model(handler: HandlerDep) -> dict[str, Any]:
    """What the page must know of the model."""
    served = handler.model
    return {
        "model": served.name,
        "max_model_len": served.max_model_len,
        "is_assistant": served.is_assistant,
        "version": version("orthrus-serve"),
    }


@router.get("/page/cluster", dependencies=[Identified], include_in_schema=False)
async def cluster(feed: Annotated[ClusterFeed, Depends(_feed)]) -> StreamingResponse:
    """The cluster's feed, as server-sent events."""
    return event_stream(feed.events())


def _answer(request: Request, file: PageFile) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _endpoint(file: PageFile) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        return _answer(request, file)

    return answer


def _index(file: PageFile) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        # The page's addresses are relative to its own, which therefore must end with a slash.
        if not request.scope.get("raw_path", b"/").endswith(b"/"):
            return RedirectResponse(f"{request.url.path.rstrip('/').rpartition('/')[2]}/")
        return _answer(request, file)

    return answer


for _name, _file in read_files().items():
    if _name == INDEX:
        router.add_api_route("/", _index(_file), include_in_schema=False)
    else:
        router.add_api_route(f"/page/{_name}", _endpoint(_file), include_in_schema=False)
