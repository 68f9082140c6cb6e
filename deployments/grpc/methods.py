"""The Orthrus service over gRPC: see orthrus.proto.

Serve ends a call's coroutine when its deadline has passed or its client has gone.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ray.serve.grpc_util import RayServegRPCContext

from deployments.access.calls import Call
from deployments.failures.failures import BodyTooLarge
from deployments.generation.generate import TextChunk, collect, generate, merge
from deployments.grpc.format import (
    chat_body,
    chat_chunk,
    completion_body,
    generate_chunk,
    request_params,
    with_status,
)
from deployments.ingress.ingress_core import IngressCore
from deployments.proto import orthrus_pb2 as pb

Message = TypeVar("Message", pb.GenerateChunk, pb.ChatChunk)


@dataclass
class _Running:
    """The chunks of a call's `n` choices. prompt: the token ids to tell with each choice's first message."""

    chunks: AsyncGenerator[TextChunk]
    n: int
    prompt: Sequence[int] = ()
    include_reasoning: bool = True
    _told: set[int] = field(default_factory=set)

    def told(self, index: int) -> Sequence[int]:
        """The prompt's token ids, where choice `index` has not told them yet."""
        if index in self._told:
            return ()
        self._told.add(index)
        return self.prompt


async def _built(
    build: Callable[..., Message], index: int, items: Sequence[TextChunk], *more: Any
) -> Message:
    """The message of a choice's `items`, made off the event loop if it has a prompt's log-probabilities, which are many."""
    if items[0].chunk.prompt_logprobs is None:
        return build(index, items, *more)
    return await asyncio.to_thread(build, index, items, *more)


class GrpcIngress(IngressCore):
    """An ingress with the methods of the service, which Serve finds by their names."""

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        async with self._rpc("Generate", grpc_context) as call:
            running = await self._generate_call(call, request)
            choices = await collect(merge([running.chunks], running.n), running.n)
            return pb.GenerateResponse(
                choices=[
                    await _built(generate_chunk, index, choice.chunks, running.told(index))
                    for index, choice in enumerate(choices)
                ]
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with self._rpc("GenerateStream", grpc_context) as call:
            running = await self._generate_call(call, request)
            async with aclosing(running.chunks) as items:
                async for item in items:
                    yield await _built(generate_chunk, item.index, [item], running.told(item.index))

    async def Chat(self, request: pb.ChatRequest, grpc_context: RayServegRPCContext) -> pb.ChatResponse:
        async with self._rpc("Chat", grpc_context) as call:
            running = await self._chat_call(call, request)
            choices = await collect(merge([running.chunks], running.n), running.n)
            return pb.ChatResponse(
                choices=[
                    await _built(
                        chat_chunk, index, choice.chunks, running.told(index), running.include_reasoning
                    )
                    for index, choice in enumerate(choices)
                ]
            )

    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ChatChunk]:
        async with self._rpc("ChatStream", grpc_context) as call:
            running = await self._chat_call(call, request)
            async with aclosing(running.chunks) as items:
                async for item in items:
                    told = running.told(item.index)
                    yield await _built(chat_chunk, item.index, [item], told, running.include_reasoning)

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
            raise with_status(error, context, call.sent_as) from None
        finally:
            call.end()

    async def _generate_call(self, call: Call, request: pb.GenerateRequest) -> "_Running":
        """Raises RequestError, ModelNotFound, BodyTooLarge."""
        self._check_message(request)
        params, body = request_params(request.sampling), completion_body(request)
        call.read(body)
        if body.constraint is not None:
            params = replace(params, grammar=await asyncio.to_thread(getattr, body.constraint, "lark"))
        [given] = body.prompts()
        prompt = await self._prompt(body, given, params.max_tokens)
        chunks = generate(self._replica, self._receiver, self._tokenizer, call, prompt, params)
        return _Running(chunks, params.n, prompt if body.return_token_ids else ())

    async def _chat_call(self, call: Call, request: pb.ChatRequest) -> "_Running":
        """As `_generate_call`."""
        self._check_message(request)
        params, body = request_params(request.sampling), chat_body(request)
        started = await self._chats.start(call, body, params)
        prompt = started.prompt if body.return_token_ids else ()
        return _Running(started.chunks, params.n, prompt, body.options.include_reasoning)

    def _check_message(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        if request.ByteSize() > self._config.max_body_bytes:
            raise BodyTooLarge(
                f"the request is over {self._config.max_body_bytes} bytes: send a shorter prompt"
            )
        self._check_model(request.model)
