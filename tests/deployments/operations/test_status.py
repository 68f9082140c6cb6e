"""What `/ready` says of each state of the replicas' deployment."""

import asyncio
from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeStatus,
)

from orthrus.deployments.operations.status import ModelStatus


@pytest.mark.parametrize(
    ("status", "replicas", "ready"),
    [
        ("HEALTHY", {"RUNNING": 1}, True),
        ("UPSCALING", {"RUNNING": 1, "STARTING": 1}, True),
        ("UPDATING", {"STARTING": 1}, False),
        ("HEALTHY", {}, True),
        # The last one is scaled away, and goes on until its streams have ended: the next request brings one back.
        ("DOWNSCALING", {"STOPPING": 1}, True),
        ("DOWNSCALING", {"STOPPING": 1, "STARTING": 1}, False),
        # It has to go before another one finds a place.
        ("UPDATING", {"STOPPING": 1}, False),
        ("UPSCALING", {"STOPPING": 1}, False),
        ("UNHEALTHY", {"STOPPING": 1}, False),
        ("DEPLOY_FAILED", {}, False),
    ],
)
def test_ready_is_who_can_answer(
    monkeypatch: pytest.MonkeyPatch, status: str, replicas: dict[str, int], ready: bool
) -> None:
    told = DeploymentStatusOverview(status, "AUTOSCALING", replicas, "as Serve says")
    app = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, {"OrthrusReplica": told})
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={"app": app}))
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    fault = asyncio.run(ModelStatus("OrthrusReplica").fault())
    assert fault == (None if ready else "as Serve says")
