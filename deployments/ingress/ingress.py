"""The ingress deployment: the HTTP APIs and the gRPC service, in front of the same replicas."""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from orthrus.deployments.access.gate import Gate
from orthrus.deployments.access.request_metrics import RequestMetrics
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.failures.log_filter import quiet_client_errors
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.generation.served_model import ServedModel
from orthrus.deployments.grpc.service import OrthrusService
from orthrus.deployments.ingress.api import create_api
from orthrus.deployments.link.receiver import ChunkReceiver
from orthrus.deployments.operations.router import recent_scrape
from orthrus.deployments.operations.status import ModelStatus
from orthrus.deployments.page.cluster import Cluster
from orthrus.deployments.page.feed import ClusterFeed
from orthrus.deployments.responses.api import ResponsesApi
from orthrus.deployments.responses.store import Responses
from orthrus.engine.config import EngineConfig

_NICENESS = 5


@serve.deployment
@serve.ingress()
class Ingress(OrthrusService):
    """Both protocols in front of one `Handler`. It is stateless: add replicas of it if tokenising is the bottleneck.

    Serve finds the gRPC methods by their names on this class, so they are inherited. The HTTP endpoints are functions of routers
    (deployments/ingress/api.py), and Serve asks for the application that has them when this object has been made.
    """

    def __init__(
        self,
        replica: DeploymentHandle,
        config: EngineConfig,
        api: ApiConfig,
        limiter: DeploymentHandle | None,
        responses: DeploymentHandle | None = None,
    ) -> None:
        """limiter: a `RateLimiter`, None if there are no keys. responses: a `ResponseStore`, None if responses are not stored."""
        # On few cores, a replica's next pass should run before the text of its last pass is made.
        os.nice(_NICENESS)
        quiet_client_errors()
        model = ServedModel.load(config)
        self._receiver = ChunkReceiver()
        gate = Gate(api, limiter, RequestMetrics(model.name))
        super().__init__(Handler(model, replica, self._receiver, gate, api))
        store = Responses(responses) if responses is not None else None
        self._responses = ResponsesApi(self._handler, store)
        self._status = ModelStatus(replica.deployment_name)
        self._feed: ClusterFeed | None = None
        if api.page:
            self._feed = ClusterFeed(Cluster(replica, self._status, recent_scrape).parts)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once, for the application that answers HTTP."""
        return create_api(self._handler, self._responses, self._status, self._feed)

    def __del__(self) -> None:
        receiver = getattr(self, "_receiver", None)
        if receiver is not None:
            receiver.close()
