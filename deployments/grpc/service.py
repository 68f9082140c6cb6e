"""The Orthrus service over gRPC (deployments/proto/orthrus.proto).

Serve cancels a call's coroutine when the call's deadline has passed or its client has gone.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from ray.serve.grpc_util import RayServegRPCContext

from orthrus.deployments.access.call import Call
from orthrus.deployments.failures.errors import BodyTooLarge
from orthrus.deployments.generation.handler import Answer, Handler
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.grpc.format import (
    chat_body,
    chat_chunk,
    completion_body,
    generate_chunk,
    request_params,
    with_status,
)
from orthrus.deployments.proto import orthrus_pb2 as pb

Message = TypeVar("Message", pb.GenerateChunk, pb.ChatChunk)


@dataclass
class _Messages(Generic[Message]):
    """An answer as messages of one kind."""

    answer: Answer
    build: Callable[[int, Sequence[TextChunk], Sequence[int]], Message]
    """Makes a message of a choice's index, some of its chunks, and the prompt's token ids or none."""
    prompt_ids: Sequence[int]
    """The prompt's token ids if the client wants them: they come with each choice's first message."""
    _begun: set[int] = field(default_factory=set)
    """Choices that have had their first message."""

    async def whole(self) -> list[Message]:
        """Wait for the answer: one message for each choice."""
        choices = await self.answer.choices()
        return [await self._message(index, choice.chunks) for index, choice in enumerate(choices)]

    async def stream(self) -> AsyncGenerator[Message]:
        """A message for each chunk."""
        async with aclosing(self.answer.chunks) as items:
            async for index, item in items:
                yield await self._message(index, [item])

    async def _message(self, index: int, items: Sequence[TextChunk]) -> Message:
        prompt = () if index in self._begun else self.prompt_ids
        self._begun.add(index)
        if items[0].chunk.prompt_logprobs is None:
            return self.build(index, items, prompt)
        # In a thread, because a prompt has many log-probabilities: other streams must not wait for them.
        return await asyncio.to_thread(self.build, index, items, prompt)


class OrthrusService:
    """The methods of the service. Serve finds them by their names on the class of the ingress."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        async with self._call("Generate", grpc_context) as call:
            messages = await self._generate(call, request)
            return pb.GenerateResponse(choices=await messages.whole())

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with self._call("GenerateStream", grpc_context) as call:
            messages = (await self._generate(call, request)).stream()
            async with aclosing(messages):
                async for message in messages:
                    yield message

    async def Chat(self, request: pb.ChatRequest, grpc_context: RayServegRPCContext) -> pb.ChatResponse:
        async with self._call("Chat", grpc_context) as call:
            messages = await self._chat(call, request)
            return pb.ChatResponse(choices=await messages.whole())

    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ChatChunk]:
        async with self._call("ChatStream", grpc_context) as call:
            messages = (await self._chat(call, request)).stream()
            async with aclosing(messages):
                async for message in messages:
                    yield message

    @asynccontextmanager
    async def _call(self, method: str, context: RayServegRPCContext) -> AsyncGenerator[Call]:
        """An admitted call. An error under it becomes the call's status."""
        call = Call(method)
        try:
            await self._handler.gate.admit(call, dict(context.invocation_metadata()))
            context.set_trailing_metadata(list(call.headers.items()))
            yield call
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            raise with_status(error, context, call.sent_as) from None
        finally:
            call.end()

    async def _generate(self, call: Call, request: pb.GenerateRequest) -> _Messages[pb.GenerateChunk]:
        """Raises RequestError, ModelNotFound, BodyTooLarge."""
        self._check(request)
        params, body = request_params(request.sampling), completion_body(request)
        # In threads: a grammar may take long to make.
        await asyncio.to_thread(call.read, body)
        params = await asyncio.to_thread(body.constrained, params)
        answer = await self._handler.complete(call, body, params)
        return _Messages(answer, generate_chunk, answer.prompts[0] if body.return_token_ids else ())

    async def _chat(self, call: Call, request: pb.ChatRequest) -> _Messages[pb.ChatChunk]:
        """Raises as `_generate` does."""
        self._check(request)
        params, body = request_params(request.sampling), chat_body(request)
        await asyncio.to_thread(call.read, body)
        answer = await self._handler.chat(call, body, params)
        build = partial(chat_chunk, include_reasoning=body.options.include_reasoning)
        return _Messages(answer, build, answer.prompts[0] if body.return_token_ids else ())

    def _check(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        limit = self._handler.config.max_body_bytes
        if request.ByteSize() > limit:
            raise BodyTooLarge(f"the request is over {limit} bytes: send a shorter prompt")
        self._handler.model.check_name(request.model)
