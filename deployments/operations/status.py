"""What an application knows of its own state, for health checks."""

import asyncio
from functools import partial

from ray import serve
from ray.serve.schema import DeploymentStatusOverview

from orthrus.deployments.operations.recent import Recent


class ModelStatus:
    """Whether the replicas of a model can answer."""

    def __init__(self, deployment: str) -> None:
        """deployment: the name of the replicas' deployment, in the application that asks."""
        self.deployment = deployment
        self._status = Recent(partial(asyncio.to_thread, serve.status))

    @property
    def application(self) -> str:
        """The name of the application that asks."""
        return str(serve.get_replica_context().app_name)

    async def deployment_status(self) -> DeploymentStatusOverview:
        """What Serve says of the replicas' deployment."""
        return (await self._status()).applications[self.application].deployments[self.deployment]

    async def fault(self) -> str | None:
        """Why no replica can answer. None if one runs, or if all were scaled away: the next request then starts one."""
        replica = await self.deployment_status()
        there = dict(replica.replica_states)
        if replica.status == "DOWNSCALING":
            there.pop(
                "STOPPING", None
            )  # They finish their streams. Nothing waits for the place that they leave.
        starting = there and not there.get("RUNNING")
        if starting or replica.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return str(replica.message)
        return None
