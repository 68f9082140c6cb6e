"""The cluster's front door: OpenAI over HTTP and the Orthrus service over gRPC, in front of the same replicas.

It validates, templates and tokenises, sends token ids to a replica, and turns the chunks that come back into text.
Serve pickles the FastAPI app while this module is being imported: what the endpoints call is imported, not defined below.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from inspect import signature
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from grpc import StatusCode
from pydantic import ValidationError
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from deployments.failures import EXPECTED, BodyTooLarge, Failure, ModelNotFound, describe_failure
from deployments.generation import TextChunk, collect, generate, merge
from deployments.grpc_format import chunk_message, request_params, whole_message, with_status
from deployments.openai_format import ResponseFormat, sse
from deployments.proto import orthrus_pb2 as pb
from deployments.protocol import ChatBody, CompletionBody, describe
from orthrus.checkpoint import resolve
from orthrus.engine_config import EngineConfig
from orthrus.errors import RequestError
from orthrus.request import RequestStats, SamplingParams
from orthrus.text import load_tokenizer

MAX_BODY_BYTES = 4 << 20

Body = TypeVar("Body", CompletionBody, ChatBody)

api = FastAPI(title="Orthrus", docs_url=None, redoc_url=None)


async def _answer_failure(_: HTTPRequest, error: Exception) -> Response:
    failure = describe_failure(error)
    return JSONResponse(failure.body, failure.status, failure.headers)


for _kind in (*EXPECTED, Exception):
    api.add_exception_handler(_kind, _answer_failure)


@api.exception_handler(404)
@api.exception_handler(405)
async def _no_route(request: HTTPRequest, error: Any) -> Response:
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(Failure(error.status_code, StatusCode.UNIMPLEMENTED, message).body, error.status_code)


async def _read(request: HTTPRequest, body: type[Body]) -> Body:
    """The checked request body. Raises RequestError and BodyTooLarge, the latter before reading all of it."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the request body is over {MAX_BODY_BYTES} bytes: send a shorter prompt")
    try:
        return body.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise describe(error) from None


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Stateless; add replicas of it where tokenising is the bottleneck."""

    def __init__(self, replica: DeploymentHandle, config: EngineConfig) -> None:
        self._replica = replica
        self._model = config.served_model_name or config.model
        self._tokenizer = load_tokenizer(resolve(config.model))
        self._model_card = {
            "id": self._model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "orthrus",
        }
        # What chat_template_kwargs can't set, since it is not the template's.
        self._template_options = frozenset(signature(self._tokenizer.apply_chat_template).parameters)

    # --- HTTP

    @api.post("/v1/completions")
    async def completions(self, request: HTTPRequest) -> Response:
        body = await _read(request, CompletionBody)
        self._check_model(body.model)
        params = body.sampling()
        prompts = [p if isinstance(p, list) else await self._encode(p) for p in body.prompts()]
        return await self._respond(body, prompts, params, chat=False)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: HTTPRequest) -> Response:
        body = await _read(request, ChatBody)
        self._check_model(body.model)
        params = body.sampling()
        prompt = await asyncio.to_thread(self._template, body)
        return await self._respond(body, [prompt], params, chat=True)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_card]}

    @api.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model_card

    @api.get("/health")
    async def health(self) -> Response:
        """503 unless a replica of the model runs, or all have been scaled away."""
        app = serve.get_replica_context().app_name
        status = (await asyncio.to_thread(serve.status)).applications[app]
        replica = status.deployments[self._replica.deployment_name]
        starting = replica.replica_states and not replica.replica_states.get("RUNNING")
        if starting or replica.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return JSONResponse({"status": "unavailable", "message": replica.message}, 503)
        return JSONResponse({"status": "ok"})

    async def _respond(
        self, body: CompletionBody | ChatBody, prompts: list[list[int]], params: SamplingParams, *, chat: bool
    ) -> Response:
        out = ResponseFormat(chat, body.model, self._tokenizer)
        # One seed for all prompts and choices: the answer can be asked for again.
        params = params.with_seed()
        streams = [generate(self._replica, self._tokenizer, prompt, params) for prompt in prompts]
        merged = merge(streams, params.n)
        if not body.stream:
            return JSONResponse(out.whole(await collect(merged, params.n * len(prompts)), params.n))
        # The first chunk is awaited here, while a refusal can still be an HTTP status.
        first = await anext(merged)
        events = self._events(out, first, merged, params.n * len(prompts), params.n, body.include_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _events(
        self,
        out: ResponseFormat,
        first: tuple[int, TextChunk],
        rest: AsyncGenerator[tuple[int, TextChunk]],
        choices: int,
        n: int,
        include_usage: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first is an event too, since the status has been sent."""
        stats: dict[int, RequestStats] = {}

        def event(index: int, item: TextChunk) -> str:
            if item.chunk.stats is not None:
                stats[index] = item.chunk.stats
            return sse(out.event(item, index))

        try:
            if out.chat:
                for index in range(choices):
                    yield sse(out.opening(index))
            yield event(*first)
            async with aclosing(rest) as items:
                async for index, item in items:
                    # Text that is held back says nothing yet.
                    if item.text or item.chunk.logprobs or item.chunk.finish_reason:
                        yield event(index, item)
            if include_usage:
                yield sse(out.usage_event([stats[i] for i in sorted(stats)], n))
        except Exception as error:
            yield sse(describe_failure(error).body)
        yield "data: [DONE]\n\n"

    # --- gRPC

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        """Unary; see orthrus.proto."""
        try:
            prompt, params = await self._grpc_input(request)
            stream = generate(self._replica, self._tokenizer, prompt, params)
            return whole_message(await collect(merge([stream], params.n), params.n))
        except Exception as error:
            raise with_status(error, grpc_context) from None

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Server streaming; see orthrus.proto."""
        try:
            prompt, params = await self._grpc_input(request)
            async with aclosing(generate(self._replica, self._tokenizer, prompt, params)) as items:
                async for item in items:
                    yield chunk_message(item.index, item.text, [item.chunk])
        except Exception as error:
            raise with_status(error, grpc_context) from None

    async def _grpc_input(self, request: pb.GenerateRequest) -> tuple[list[int], SamplingParams]:
        if request.ByteSize() > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the request is over {MAX_BODY_BYTES} bytes: send a shorter prompt")
        self._check_model(request.model)
        params = request_params(request)
        if request.WhichOneof("input") is None:
            raise RequestError("set prompt or prompt_token_ids", "prompt")
        if request.WhichOneof("input") == "prompt_token_ids":
            return list(request.prompt_token_ids.ids), params
        return await self._encode(request.prompt), params

    # --- both

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFound(f"the model {model!r} does not exist here: use {self._model!r}")

    async def _encode(self, text: str) -> list[int]:
        """Token ids of a text, off the event loop: a long prompt must not hold up other streams."""
        return await asyncio.to_thread(self._tokenizer.encode, text)

    def _template(self, body: ChatBody) -> list[int]:
        """Token ids of the chat. Raises RequestError where the template refuses it."""
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: use /v1/completions", "messages")
        options = body.chat_template_kwargs or {}
        taken = sorted(self._template_options.intersection(options))
        if taken:
            raise RequestError(
                f"chat_template_kwargs can't set {taken[0]!r}: remove it", "chat_template_kwargs"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))
