"""One model replica: an engine in its own thread behind a Serve deployment."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray import serve
from transformers.utils.logging import disable_progress_bar

from orthrus.deployments.failures.log_filter import quiet_client_errors
from orthrus.deployments.link.errors import LinkLost
from orthrus.deployments.link.framing import Address
from orthrus.deployments.link.sender import ChunkLinks
from orthrus.deployments.replica.engine_metrics import MetricsExporter
from orthrus.deployments.replica.reports import Capacity, RoutingReport, counters, engine_load
from orthrus.deployments.replica.stages import clear_stages, publish_stages
from orthrus.engine import Engine
from orthrus.engine.async_engine import AsyncEngine
from orthrus.engine.config import EngineConfig
from orthrus.loading import stages
from orthrus.requests.request import Request, SamplingParams
from orthrus.text.grammar import json_grammar

logger = logging.getLogger("ray.serve")


@serve.deployment
class OrthrusReplica:
    """Owns one engine and runs requests on it. A RequestError reaches the caller. Cancelling a call cancels its request."""

    def __init__(self, config: EngineConfig, load: Callable[[EngineConfig], Engine]) -> None:
        quiet_client_errors()
        publish_stages()
        disable_progress_bar()  # It would only fill the log.
        self._engine = AsyncEngine(load(config), on_failure=_end_process)
        engine = self._engine.engine
        if engine.takes_grammars:
            stages.info("preparing structured output")
            # The first grammar for a large vocabulary takes seconds, and all streams would wait for it.
            engine.check(Request("first-grammar", [0], SamplingParams(grammar=json_grammar({}))))
        self._links = ChunkLinks()
        self._load_since = time.monotonic(), engine.stats
        self._metrics = MetricsExporter(engine)
        # Loaded objects stay for good: keep the garbage collector from scanning them, since passes would wait for that.
        gc.collect()
        gc.freeze()
        clear_stages()
        logger.info(
            "%s ready: schedule %s, context %d", config.model, engine.schedule_name, engine.max_model_len
        )

    async def generate(self, request: Request, address: Address) -> AsyncGenerator[bytes]:
        """Run a request. Its chunks go over the link to `address`.

        Yields the link's name once, after the last chunk has been handed to it. Raises RequestError, and LinkLost if the
        connection to the ingress ends.
        """
        link = await self._links.to(address)
        run = asyncio.ensure_future(self._engine.run(request, link.send))
        try:
            await asyncio.wait((run, link.lost), return_when=asyncio.FIRST_COMPLETED)
            if not run.done():
                raise LinkLost("the connection to the ingress has ended")
            run.result()
        finally:
            run.cancel()
        yield link.name

    async def stats(self) -> dict[str, Any]:
        """The engine's counters (`EngineStats`)."""
        return counters(self._engine.stats)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every `metrics_interval_s`: the signals since the last call, for the autoscaling policy."""
        (then, before), now, stats = self._load_since, time.monotonic(), self._engine.stats
        self._load_since = now, stats
        return engine_load(before, stats, now - then)

    async def record_replica_metadata(self) -> dict[str, int]:
        """Called by Serve once: what the request router must know of this replica's size."""
        return Capacity.of(self._engine.engine)._asdict()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve every `request_routing_stats_period_s`: load and cached prefixes, for the request router."""
        # Read without waiting for the engine's thread: a pass may take long or hang, and the router needs the load then too.
        return RoutingReport.of(self._engine.engine)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            self._metrics.close()
            self._links.close()
            engine.close()


def _end_process(error: Exception) -> None:
    """End this process at once, as if it were killed: it can't repair a failed engine, and may not be able to use its GPU again.

    Serve starts another replica at once. The ingress sends requests that have no chunk yet to other replicas.
    """
    logger.critical("the engine has failed, and this replica ends with it", exc_info=error)
    logging.shutdown()
    os._exit(1)
