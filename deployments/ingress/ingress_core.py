"""What an ingress has, whatever the protocol."""

import asyncio
import os
import time
from functools import partial

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.access.calls import Gate
from deployments.access.request_metrics import RequestMetrics
from deployments.bodies.completion_body import CompletionBody
from deployments.config.api import ApiConfig
from deployments.failures.failures import ModelNotFound
from deployments.failures.log_filter import quiet_client_errors
from deployments.generation.chats import Chats
from deployments.link.chunk_link import ChunkReceiver
from deployments.operations.metrics import scrape
from deployments.operations.recent import Recent
from deployments.responses.api import ResponsesApi
from deployments.responses.store import Responses
from orthrus.engine.config import EngineConfig
from orthrus.models.families import load_config
from orthrus.models.hub import resolve
from orthrus.text.tokenizer import load_tokenizer

_NICENESS = 5


class IngressCore:
    """One model's tokenizer, its way to the replicas, and the gate that lets calls in."""

    def __init__(
        self,
        replica: DeploymentHandle,
        config: EngineConfig,
        api: ApiConfig,
        limiter: DeploymentHandle | None,
        responses: DeploymentHandle | None = None,
    ) -> None:
        """limiter: a `RateLimiter`, where there are keys. responses: a `ResponseStore`, where responses are stored."""
        # Where cores are few, a replica's next pass comes before the text of its last one.
        os.nice(_NICENESS)
        quiet_client_errors()
        self._replica = replica
        self._receiver = ChunkReceiver()
        self._config = api
        self._model = config.served_model_name or config.model
        self._gate = Gate(api, limiter, RequestMetrics(self._model))
        path = resolve(config.model)
        self._tokenizer = load_tokenizer(path)
        model = load_config(path)
        self._vocab_size = model.vocab_size
        trained = model.max_position_embeddings
        self._max_model_len = config.max_model_len or min(trained, config.kv_cache_tokens or trained)
        self._model_card = {
            "id": self._model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "orthrus",
            "max_model_len": self._max_model_len,
        }
        self._chats = Chats(replica, self._receiver, self._tokenizer, self._max_model_len)
        store = Responses(responses) if responses is not None else None
        self._responses = ResponsesApi(self._chats, self._tokenizer, store)
        self._status = Recent(partial(asyncio.to_thread, serve.status))
        self._scrape = Recent(scrape)

    @property
    def cors_origins(self) -> list[str]:
        """The pages' origins that may call the API from a browser."""
        return self._config.cors_origins

    def __del__(self) -> None:
        receiver = getattr(self, "_receiver", None)
        if receiver is not None:
            receiver.close()

    def _check_model(self, model: str | None) -> None:
        """None stands for the one that is served, where a body may leave it out. Raises ModelNotFound."""
        if model is not None and model != self._model:
            raise ModelNotFound(f"the model {model!r} does not exist here: use {self._model!r}")

    async def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, off the event loop: a long prompt must not hold up other streams."""
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def _prompt(
        self, body: CompletionBody, prompt: str | list[int], max_tokens: int | None
    ) -> list[int]:
        """The token ids that a completion goes on from."""
        if isinstance(prompt, str):
            prompt = await self._encode(prompt, body.add_special_tokens)
        return body.truncated(prompt, self._max_model_len, max_tokens)
