"""The cluster's front door: OpenAI over HTTP and the Orthrus service over gRPC, in front of the same replicas.

It validates, templates and tokenises, sends token ids to a replica, and turns the chunks that come back into text.
Serve pickles the FastAPI app while this module is being imported: what the endpoints call is imported, not defined below.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from grpc import StatusCode
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from deployments.api_config import ApiConfig
from deployments.calls import Call, CallMiddleware, Gate
from deployments.chat_body import ChatBody
from deployments.chat_output import ChatSplitter
from deployments.chat_template import ChatTemplate
from deployments.chunk_link import ChunkReceiver
from deployments.completion_body import CompletionBody
from deployments.failures import EXPECTED, BodyTooLarge, Failure, ModelNotFound, describe_failure
from deployments.generation import TextChunk, collect, generate, merge
from deployments.grpc_format import chat_body, chat_chunk, generate_chunk, request_params, with_status
from deployments.http_body import read_body
from deployments.log_filter import quiet_client_errors
from deployments.metrics import scrape
from deployments.openai_format import ResponseFormat, spell, sse
from deployments.proto import orthrus_pb2 as pb
from deployments.recent import Recent
from deployments.tokenize_body import DetokenizeBody, TokenizeBody
from orthrus.checkpoint import resolve
from orthrus.config import ModelConfig
from orthrus.engine_config import EngineConfig
from orthrus.errors import RequestError
from orthrus.request import RequestStats, SamplingParams
from orthrus.text import load_tokenizer

_NICENESS = 5

# Traces are Serve's and ours (deployments/calls.py).
api = FastAPI(title="Orthrus", openapi_url=None, telemetry={"tracing": False})
api.add_middleware(CallMiddleware)


async def _answer_failure(request: HTTPRequest, error: Exception) -> Response:
    if (call := getattr(request.state, "call", None)) is not None:
        call.outcome = type(error).__name__
    failure = describe_failure(error)
    return JSONResponse(failure.body, failure.status, failure.headers)


for _kind in (*EXPECTED, Exception):
    api.add_exception_handler(_kind, _answer_failure)


@api.exception_handler(404)
@api.exception_handler(405)
async def _no_route(request: HTTPRequest, error: Any) -> Response:
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(Failure(error.status_code, StatusCode.UNIMPLEMENTED, message).body, error.status_code)


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Stateless; add replicas of it where tokenising is the bottleneck."""

    def __init__(
        self,
        replica: DeploymentHandle,
        config: EngineConfig,
        api: ApiConfig,
        limiter: DeploymentHandle | None,
    ) -> None:
        # Where cores are few, a replica's next pass comes before the text of its last one.
        os.nice(_NICENESS)
        quiet_client_errors()
        self._replica = replica
        self._receiver = ChunkReceiver()
        self._config = api
        self._gate = Gate(api, limiter)
        self._model = config.served_model_name or config.model
        path = resolve(config.model)
        self._tokenizer = load_tokenizer(path)
        trained = ModelConfig.from_dir(path).max_position_embeddings
        self._max_model_len = config.max_model_len or min(trained, config.kv_cache_tokens or trained)
        self._model_card = {
            "id": self._model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "orthrus",
            "max_model_len": self._max_model_len,
        }
        self._template = ChatTemplate(self._tokenizer)
        self._status = Recent(partial(asyncio.to_thread, serve.status))
        self._scrape = Recent(scrape)

    def __del__(self) -> None:
        receiver = getattr(self, "_receiver", None)
        if receiver is not None:
            receiver.close()

    # --- HTTP

    @api.post("/v1/completions")
    async def completions(self, request: HTTPRequest) -> Response:
        call = await self._admit("completions", request)
        body = await read_body(request, CompletionBody, self._config)
        self._check_model(body.model)
        params = body.sampling()
        given = body.prompts()
        prompts = [prompt if isinstance(prompt, list) else await self._encode(prompt) for prompt in given]
        out = ResponseFormat(False, body.model, self._tokenizer, body.include_usage)
        if body.echo:
            # A text as it came: the tokenizer may have normalised it.
            out.echo = [
                prompt if isinstance(prompt, str) else await asyncio.to_thread(self._tokenizer.decode, prompt)
                for prompt in given
            ]
        return await self._respond(call, body, out, prompts, params)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: HTTPRequest) -> Response:
        call = await self._admit("chat.completions", request)
        body = await read_body(request, ChatBody, self._config)
        self._check_model(body.model)
        params = body.sampling()
        prompt = await asyncio.to_thread(self._template.apply, body)
        out = ResponseFormat(True, body.model, self._tokenizer, body.include_usage)
        params = replace(params, grammar=prompt.grammar)
        return await self._respond(call, body, out, [prompt.tokens], params, prompt.splitter)

    @api.get("/v1/models")
    async def models(self, request: HTTPRequest) -> dict[str, Any]:
        self._gate.identify(request.headers)
        return {"object": "list", "data": [self._model_card]}

    @api.get("/v1/models/{model:path}")
    async def model(self, request: HTTPRequest, model: str) -> dict[str, Any]:
        self._gate.identify(request.headers)
        self._check_model(model)
        return self._model_card

    @api.post("/tokenize")
    async def tokenize(self, request: HTTPRequest) -> dict[str, Any]:
        call = await self._admit("tokenize", request)
        body = await read_body(request, TokenizeBody, self._config)
        self._check_model(body.model)
        if body.prompt is None:
            tokens = (await asyncio.to_thread(self._template.apply, body.chat())).tokens
        else:
            tokens = await self._encode(body.prompt, add_special_tokens=body.add_special_tokens)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self._max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [spell(self._tokenizer, token) for token in tokens]
        call.outcome = "ok"
        return answer

    @api.post("/detokenize")
    async def detokenize(self, request: HTTPRequest) -> dict[str, str]:
        call = await self._admit("detokenize", request)
        body = await read_body(request, DetokenizeBody, self._config)
        self._check_model(body.model)
        known = len(self._tokenizer)
        if any(not 0 <= token < known for token in body.tokens):
            raise RequestError(f"token ids must be between 0 and {known - 1}", "tokens")
        text = await asyncio.to_thread(self._tokenizer.decode, body.tokens)
        call.outcome = "ok"
        return {"prompt": text}

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """This ingress is alive; says nothing of the model."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(self) -> Response:
        """503 unless a replica of the model runs, or all have been scaled away and the next request brings one back."""
        app = serve.get_replica_context().app_name
        replica = (await self._status()).applications[app].deployments[self._replica.deployment_name]
        starting = replica.replica_states and not replica.replica_states.get("RUNNING")
        if starting or replica.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return JSONResponse({"status": "unavailable", "message": replica.message}, 503)
        return JSONResponse({"status": "ok"})

    @api.get("/metrics")
    async def metrics(self) -> Response:
        return Response(await self._scrape(), media_type="text/plain; version=0.0.4")

    async def _admit(self, endpoint: str, request: HTTPRequest) -> Call:
        """An admitted call, which `CallMiddleware` ends."""
        request.state.call = call = Call(endpoint)
        await self._gate.admit(call, request.headers)
        return call

    async def _respond(
        self,
        call: Call,
        body: CompletionBody | ChatBody,
        out: ResponseFormat,
        prompts: list[list[int]],
        params: SamplingParams,
        splitter: Callable[[], ChatSplitter] | None = None,
    ) -> Response:
        call.session = call.session or body.prompt_cache_key or ""
        # One seed for all prompts and choices: the answer can be asked for again.
        params = params.with_seed()
        streams = [
            generate(self._replica, self._receiver, self._tokenizer, call, prompt, params, splitter)
            for prompt in prompts
        ]
        merged = merge(streams, params.n)
        if not body.stream:
            choices = await collect(merged, params.n * len(prompts))
            call.outcome = "ok"
            return JSONResponse(out.whole(choices, params.n))
        # The first chunk is awaited here, while a refusal can still be an HTTP status.
        first = await anext(merged)
        events = self._events(call, out, first, merged, params.n * len(prompts), params.n)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _events(
        self,
        call: Call,
        out: ResponseFormat,
        first: tuple[int, TextChunk],
        rest: AsyncGenerator[tuple[int, TextChunk]],
        choices: int,
        n: int,
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first is an event too, since the status has been sent."""
        stats: dict[int, RequestStats] = {}

        def event(index: int, item: TextChunk) -> str:
            if item.chunk.stats is not None:
                stats[index] = item.chunk.stats
            return out.stream(item, index)

        try:
            for index in range(choices):
                if (opening := out.opening(index, n)) is not None:
                    yield sse(opening)
            if not first[1].says_nothing:
                yield event(*first)
            async with aclosing(rest) as items:
                async for index, item in items:
                    if not item.says_nothing:
                        yield event(index, item)
            if out.include_usage:
                yield sse(out.usage_event([stats[i] for i in sorted(stats)], n))
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            yield sse(describe_failure(error).body)
        yield "data: [DONE]\n\n"

    # --- gRPC: see orthrus.proto. Serve ends a call's coroutine when its deadline has passed or its client has gone.

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        async with self._rpc("Generate", grpc_context) as call:
            stream, n = await self._generate_call(call, request)
            choices = await collect(merge([stream], n), n)
            return pb.GenerateResponse(
                choices=[generate_chunk(index, choice.chunks) for index, choice in enumerate(choices)]
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with self._rpc("GenerateStream", grpc_context) as call:
            stream, _ = await self._generate_call(call, request)
            async with aclosing(stream) as items:
                async for item in items:
                    yield generate_chunk(item.index, [item])

    async def Chat(self, request: pb.ChatRequest, grpc_context: RayServegRPCContext) -> pb.ChatResponse:
        async with self._rpc("Chat", grpc_context) as call:
            stream, n = await self._chat_call(call, request)
            choices = await collect(merge([stream], n), n)
            return pb.ChatResponse(
                choices=[chat_chunk(index, choice.chunks) for index, choice in enumerate(choices)]
            )

    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ChatChunk]:
        async with self._rpc("ChatStream", grpc_context) as call:
            stream, _ = await self._chat_call(call, request)
            async with aclosing(stream) as items:
                async for item in items:
                    yield chat_chunk(item.index, [item])

    @asynccontextmanager
    async def _rpc(self, method: str, context: RayServegRPCContext) -> AsyncGenerator[Call]:
        """An admitted call. What goes wrong under it gets the status that fits."""
        call = Call(method)
        try:
            await self._gate.admit(call, dict(context.invocation_metadata()))
            context.set_trailing_metadata(list(call.headers.items()))
            yield call
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            raise with_status(error, context) from None
        finally:
            call.end()

    async def _generate_call(
        self, call: Call, request: pb.GenerateRequest
    ) -> tuple[AsyncGenerator[TextChunk], int]:
        """The chunks of a call and its number of choices. Raises RequestError, ModelNotFound, BodyTooLarge."""
        self._check_message(request)
        params = request_params(request.sampling)
        match request.WhichOneof("input"):
            case "prompt":
                prompt = await self._encode(request.prompt)
            case "prompt_token_ids":
                prompt = list(request.prompt_token_ids.ids)
            case _:
                raise RequestError("set prompt or prompt_token_ids", "prompt")
        return generate(self._replica, self._receiver, self._tokenizer, call, prompt, params), params.n

    async def _chat_call(self, call: Call, request: pb.ChatRequest) -> tuple[AsyncGenerator[TextChunk], int]:
        """As `_generate_call`."""
        self._check_message(request)
        params = request_params(request.sampling)
        prompt = await asyncio.to_thread(self._template.apply, chat_body(request))
        params = replace(params, grammar=prompt.grammar)
        return generate(
            self._replica, self._receiver, self._tokenizer, call, prompt.tokens, params, prompt.splitter
        ), params.n

    def _check_message(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        if request.ByteSize() > self._config.max_body_bytes:
            raise BodyTooLarge(
                f"the request is over {self._config.max_body_bytes} bytes: send a shorter prompt"
            )
        self._check_model(request.model)

    # --- both

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFound(f"the model {model!r} does not exist here: use {self._model!r}")

    async def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, off the event loop: a long prompt must not hold up other streams."""
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
