"""The cluster's front door: the HTTP APIs, and the Orthrus service over gRPC, in front of the same replicas.

It validates, templates and tokenises, sends token ids to a replica, and turns the chunks that come back into text.
Serve pickles the FastAPI app while this module is being imported: what the endpoints call is imported, not defined below.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json
from ray import serve

from deployments.access.calls import Call, CallMiddleware
from deployments.bodies.completion_body import CompletionBody
from deployments.chat.body import ChatBody
from deployments.chat.output import ChatSplitter
from deployments.failures.failures import EXPECTED, Failure, describe_failure
from deployments.generation.generate import TextChunk, check_scores, collect, generate, merge
from deployments.grpc.methods import GrpcIngress
from deployments.http.body import read_body
from deployments.http.manners import Cors, PathManners, no_route
from deployments.ingress.docs import router
from deployments.messages.api import create_message
from deployments.messages.body import CountTokensBody, MessagesBody
from deployments.messages.format import error_body, error_status, is_messages_path
from deployments.openai.format import ResponseFormat, sse
from deployments.openai.logprobs import Echo, spell
from deployments.operations.metrics import spell as spell_metrics
from deployments.responses.body import ResponsesBody
from deployments.tokenizer.body import DetokenizeBody, TokenizeBody
from deployments.tokenizer.info import tokenizer_info
from orthrus.errors import RequestError
from orthrus.requests.request import RequestStats, SamplingParams

# Traces are Serve's and ours (deployments/access/calls.py).
api = FastAPI(title="Orthrus", openapi_url=None, redirect_slashes=False, telemetry={"tracing": False})
api.include_router(router)
# The last one added is the first that a request meets.
for _middleware in (CallMiddleware, Cors, PathManners):
    api.add_middleware(_middleware)


async def _answer_failure(request: HTTPRequest, error: Exception) -> Response:
    call: Call | None = getattr(request.state, "call", None)
    if call is not None:
        call.outcome = type(error).__name__
    return _failure_response(request, describe_failure(error, call.sent_as if call is not None else None))


def _failure_response(request: HTTPRequest, failure: Failure) -> Response:
    """The failure in the words of the API that was called."""
    if is_messages_path(request.url.path):
        return JSONResponse(error_body(failure), error_status(failure), failure.headers)
    return JSONResponse(failure.body, failure.status, failure.headers)


for _kind in (*EXPECTED, Exception):
    api.add_exception_handler(_kind, _answer_failure)


@api.exception_handler(404)
@api.exception_handler(405)
async def _no_route(request: HTTPRequest, error: Any) -> Response:
    answer = no_route(request, error.status_code)
    return answer if isinstance(answer, Response) else _failure_response(request, answer)


@serve.deployment
@serve.ingress(api)
class Ingress(GrpcIngress):
    """Stateless; add replicas of it where tokenising is the bottleneck."""

    @api.post("/v1/completions")
    async def completions(self, request: HTTPRequest) -> Response:
        call = await self._admit("completions", request)
        body = await read_body(request, CompletionBody, self._config)
        self._check_model(body.model)
        call.read(body)
        params = await asyncio.to_thread(body.sampling)
        given = body.prompts()
        prompts = [await self._prompt(body, prompt, body.max_tokens) for prompt in given]
        # Before anything is done with them: what is no token may be no number that anything holds.
        if any(tokens and (min(tokens) < 0 or max(tokens) >= self._vocab_size) for tokens in prompts):
            raise RequestError(f"prompt token ids must be between 0 and {self._vocab_size - 1}", "prompt")
        check_scores(prompts * params.n if body.echo else prompts, params)
        out = ResponseFormat(
            False,
            body.model,
            self._tokenizer,
            body.options.include_usage,
            n=params.n,
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            skip_special_tokens=params.skip_special_tokens,
            options=body.options,
            prompts=prompts,
        )
        if body.echo:
            out.echo = [
                # What is left of a text is spelled from its tokens.
                await asyncio.to_thread(
                    Echo.of,
                    self._tokenizer,
                    prompt if body.truncate_prompt_tokens is None else tokens,
                    tokens,
                    out.logprobs is not None,
                )
                for prompt, tokens in zip(given, prompts, strict=True)
            ]
        return await self._respond(call, body, out, prompts, params)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: HTTPRequest) -> Response:
        call = await self._admit("chat.completions", request)
        body = await read_body(request, ChatBody, self._config)
        self._check_model(body.model)
        call.read(body)
        params = body.sampling()
        prompt = await self._chats.prompt(body)
        out = ResponseFormat(
            True,
            body.model,
            self._tokenizer,
            body.options.include_usage,
            n=params.n,
            logprobs=body.alternatives,
            prompt_logprobs=body.prompt_logprobs,
            options=body.options,
            prompts=[prompt.tokens],
        )
        params = replace(params, grammar=prompt.grammar)
        return await self._respond(call, body, out, [prompt.tokens], params, prompt.splitter)

    @api.post("/v1/responses")
    async def responses(self, request: HTTPRequest) -> Response:
        call = await self._admit("responses", request)
        body = await read_body(request, ResponsesBody, self._config)
        self._check_model(body.model)
        return await self._responses.create(call, body)

    @api.post("/v1/responses/input_tokens")
    async def input_tokens(self, request: HTTPRequest) -> dict[str, Any]:
        call = await self._admit("responses.input_tokens", request)
        body = await read_body(request, ResponsesBody, self._config)
        self._check_model(body.model)
        return await self._responses.count(call, body)

    @api.get("/v1/responses/{id}")
    async def stored_response(self, request: HTTPRequest, id: str) -> dict[str, Any]:
        call = await self._admit("responses.get", request)
        return await self._responses.get(call, id, request.query_params)

    @api.delete("/v1/responses/{id}")
    async def delete_response(self, request: HTTPRequest, id: str) -> dict[str, Any]:
        call = await self._admit("responses.delete", request)
        return await self._responses.delete(call, id)

    @api.get("/v1/responses/{id}/input_items")
    async def input_items(self, request: HTTPRequest, id: str) -> dict[str, Any]:
        call = await self._admit("responses.input_items", request)
        return await self._responses.input_items(call, id, request.query_params)

    @api.post("/v1/messages")
    async def messages(self, request: HTTPRequest) -> Response:
        call = await self._admit("messages", request)
        body = await read_body(request, MessagesBody, self._config)
        self._check_model(body.model)
        return await create_message(call, body, self._chats)

    @api.post("/v1/messages/count_tokens")
    async def count_tokens(self, request: HTTPRequest) -> dict[str, int]:
        call = await self._admit("messages.count_tokens", request)
        body = await read_body(request, CountTokensBody, self._config)
        self._check_model(body.model)
        prompt = await self._chats.prompt(body.chat())
        call.outcome = "ok"
        return {"input_tokens": len(prompt.tokens)}

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
            tokens = (await self._chats.prompt(body.chat())).tokens
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

    @api.get("/tokenizer_info")
    async def tokenizer_info(self, request: HTTPRequest) -> dict[str, Any]:
        self._gate.identify(request.headers)
        return tokenizer_info(self._tokenizer, self._max_model_len)

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
    async def metrics(self, request: HTTPRequest) -> Response:
        text, media_type = spell_metrics(await self._scrape(), request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})

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
            if params.prompt_logprobs is None:
                return JSONResponse(out.whole(choices))
            # It may be long: other streams go on while it is made, and stand still a seventh as long while it is encoded.
            encoded = await asyncio.to_thread(lambda: to_json(out.whole(choices)))
            return Response(encoded, media_type="application/json")
        # The first chunk is awaited here, while a refusal can still be an HTTP status.
        first = await anext(merged)
        events = self._events(call, out, first, merged, params.n * len(prompts))
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
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first is an event too, since the status has been sent."""
        stats: dict[int, RequestStats] = {}

        async def event(index: int, item: TextChunk) -> str:
            """ "" where there is nothing to tell."""
            if item.chunk.stats is not None:
                stats[index] = item.chunk.stats
            told = out.take(item)
            if told is None:
                return ""
            if out.scores_prompts:
                return await asyncio.to_thread(out.stream, told, index)
            return out.stream(told, index)

        try:
            for index in range(choices):
                if (opening := out.opening(index)) is not None:
                    yield out.sse(opening)
            if text := await event(*first):
                yield text
            async with aclosing(rest) as items:
                async for index, item in items:
                    if text := await event(index, item):
                        yield text
            if out.include_usage:
                yield out.sse(out.usage_event([stats[i] for i in sorted(stats)]))
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            yield sse(describe_failure(error, call.sent_as).body)
        yield "data: [DONE]\n\n"
