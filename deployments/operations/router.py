"""What operators ask for: health, readiness, metrics and version. None of it needs a key."""

from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from orthrus.deployments.operations.metrics import scrape, spell
from orthrus.deployments.operations.recent import Recent
from orthrus.deployments.operations.status import ModelStatus

router = APIRouter()


async def _status(request: Request) -> ModelStatus:
    status: ModelStatus = request.app.state.status
    return status


recent_scrape = Recent(scrape)
"""`scrape`, at most once a second."""


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether this ingress is alive. This says nothing about the model."""
    return {"status": "ok"}


@router.api_route("/ping", methods=["GET", "POST"], operation_id="ping")
async def ping() -> dict[str, str]:
    """Whether this ingress is alive, as `/health`."""
    return {}


@router.get("/ready")
async def ready(status: Annotated[ModelStatus, Depends(_status)]) -> Response:
    """503 unless a replica of the model runs, or all have been scaled away and the next request brings one back."""
    fault = await status.fault()
    if fault is not None:
        return JSONResponse({"status": "unavailable", "message": fault}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics of the cluster, in Prometheus' format."""
    text, media_type = spell(await recent_scrape(), request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": media_type})


@router.get("/version")
async def version_of_server() -> dict[str, str]:
    """The server's version."""
    return {"version": version("orthrus-serve")}
